"""An engine without a model: it keeps the scheduler's promises under watch while it runs requests.

The cache is simulated token by token: what stands in a cell is all the tokens up to that one. A chunk is computed only
from cells that hold what they should, so a page that is shared wrongly, given out twice or lost is seen at once.
"""

from collections import Counter

from cutp.engine.request import Request
from cutp.engine.scheduler import Scheduler
from cutp.kv_cache import PagePool, PrefixCache


class Wish:
    """Wants the hidden states of a prompt's positions first .. stop - 1, each once and in order."""

    def __init__(self, first, stop):
        self.next_position, self.stop = first, stop


def request(id, prompt, new=0, *, wanted_from=None, share=True, salt=b""):
    """`prompt`: token ids, or a number of tokens that no other request has."""
    ids = list(prompt) if not isinstance(prompt, int) else [1000 * (id + 1) + i for i in range(prompt)]
    made = Request(id, id, None, ids, len(ids) + new, share_prefix=share, cache_salt=salt)
    if wanted_from is not None:
        made.scores = Wish(wanted_from, len(ids) - 1)
    return made


class SimulatedEngine:
    """budget, running, max_len: the scheduler's limits. computed: tokens of each request that were in chunks."""

    def __init__(self, *requests, pages=10, page_size=4, budget=8, running=10, max_len=10_000, cache=True, salt=b""):
        self.pool = PagePool(pages, page_size)
        self.cache = PrefixCache(self.pool, salt) if cache else None
        self.scheduler = Scheduler(self.pool, max_batch_tokens=budget, max_running=running, max_len=max_len,
                                   prefix_cache=self.cache)
        self.cells, self.numbers, self.known_prefixes = {}, {}, {}
        self.requests, self.finished, self.cancelled, self.passes = [], [], [], 0
        self.computed, self.hits, self.preemptions = Counter(), Counter(), Counter()
        self.patience = {}
        for one in requests:
            self.add(one)

    def add(self, request):
        self.scheduler.add(request)
        self.requests.append(request)
        # The oldest gets a token in every pass, and then the next one is the oldest.
        self.patience[request.id] = self.passes + sum(r.max_total for r in self.unfinished())

    def cancel(self, request):
        self.scheduler.cancel(request)
        if request not in self.finished:
            self.finished.append(request)
            self.cancelled.append(request)

    def unfinished(self):
        return [request for request in self.requests if request not in self.finished]

    def step(self, cancel_during=()):
        """One pass; returns its plan as [(id, start, stop)]."""
        before = {request: request.cached for request in self.requests}
        plan = self.scheduler.schedule()
        self.check_plan(plan, before)
        self.check_pages()
        for chunk in plan.chunks:
            self.compute(chunk)
        lines = [(chunk.request.id, chunk.start, chunk.stop) for chunk in plan.chunks]
        completes = [chunk.request for chunk in plan.chunks if chunk.completes]
        for request in cancel_during:
            self.cancel(request)
        self.scheduler.advance(plan.chunks)
        for request in completes:
            if request not in self.finished:
                self.take_token(request)
        self.passes += 1
        self.check_pages()
        assert all(self.passes < self.patience[request.id] for request in self.unfinished())
        return lines

    def run(self):
        """Runs to the end; returns the plans."""
        plans = []
        while self.scheduler.has_work:
            plans.append(self.step())
        assert self.pool.free_pages == self.pool.num_pages and not self.scheduler._keys
        assert not self.scheduler.tables.array.any() and not self.scheduler.tables.counts.any()
        return plans

    def compute(self, chunk):
        request, size = chunk.request, self.pool.page_size
        row = self.scheduler.tables.lookup_table([request])[0].tolist()
        contents = self.prefixes(request)
        for position in range(chunk.start):
            assert self.cells[row[position // size], position % size] == contents[position]
        for position in range(chunk.start, chunk.stop):
            assert self.pool.holders(row[position // size]) == 1  # nobody else reads what is being written
            self.cells[row[position // size], position % size] = contents[position]
        self.computed[request.id] += chunk.stop - chunk.start
        if request.scores is not None and request.scores.next_position < request.scores.stop:
            assert chunk.start <= request.scores.next_position
            request.scores.next_position = max(request.scores.next_position, chunk.stop)

    def prefixes(self, request):
        """A number for each of a request's positions; it stands for the tokens up to there, and for the salt."""
        known = self.known_prefixes.setdefault(request.id, [])
        for token in request.tokens(len(known), request.length):
            parent = known[-1] if known else (request.cache_salt, request.share_prefix)
            known.append(self.numbers.setdefault((parent, token), len(self.numbers)))
        return known

    def take_token(self, request):
        assert request.cached == request.length
        if request.length < request.max_total:
            # Equal requests generate equal tokens, some of them the same as another's.
            request.generated.append(sum(request.tokens(0, request.length)) % 2)
        if request.length == request.max_total:
            self.scheduler.finish(request)
            self.finished.append(request)

    def check_plan(self, plan, before):
        scheduler, size = self.scheduler, self.pool.page_size
        planned = [chunk.request for chunk in plan.chunks]
        assert len(set(planned)) == len(planned)
        used = sum(chunk.stop - chunk.start for chunk in plan.chunks)
        assert used <= scheduler.max_batch_tokens
        for request, start, stop in plan.chunks:
            assert start == request.cached < stop <= request.length and request in scheduler.running
        # Generating requests first, each kind by age; the oldest of all always.
        running_before = [r for r in scheduler.running if r not in plan.admitted]
        keys = [(request not in running_before or request.length - before[request] > 1, request.id)
                for request in planned]
        assert keys == sorted(keys)
        assert not scheduler.running or scheduler.running[0] in planned
        # Tokens are skipped only for the prefix cache's sake, by whole pages, and none that is needed.
        skipped = 0
        for request in self.unfinished():
            start = 0 if request in plan.preempted else before[request]
            if request.cached != start:
                assert request.share_prefix and start % size == request.cached % size == 0 and self.cache is not None
                assert start < request.cached <= request.needed_from < request.length
                skipped += request.cached - start
                self.hits[request.id] += request.cached - start
        assert skipped == plan.cached_tokens
        # Seniority.
        ids = [r.id for r in scheduler.running] + [r.id for r in scheduler.waiting]
        assert ids == sorted(ids) and set(ids) == {r.id for r in self.unfinished()}
        assert all(r.slot is None and not r.pages and r.cached == 0 for r in scheduler.waiting)
        assert set(plan.admitted) <= set(scheduler.running) and set(plan.preempted) <= set(scheduler.waiting)
        assert not plan.admitted or not plan.preempted
        self.preemptions.update(request.id for request in plan.preempted)
        if used < scheduler.max_batch_tokens:
            self.check_nothing_idles(plan, planned)

    def check_nothing_idles(self, plan, planned):
        """With budget left, who is not planned is held up by a reason that will pass."""
        scheduler, size = self.scheduler, self.pool.page_size
        written = [(chunk.request, chunk.request.tokens(0, (page + 1) * size)) for chunk in plan.chunks
                   for page in range(chunk.start // size, self.pool.pages_for(chunk.stop))
                   if (page + 1) * size <= chunk.request.length]
        for request in scheduler.running:
            if request in planned:
                # A shorter chunk than there is budget for: no page was left for more.
                [stop] = [chunk.stop for chunk in plan.chunks if chunk.request is request]
                assert stop == request.length or (stop % size == 0 and not self.pool.free_pages)
                continue
            follows = any(older.id < request.id and older.share_prefix and older.cache_salt == request.cache_salt
                          and tokens == request.tokens(0, request.cached + size) for older, tokens in written)
            pauses = request is scheduler.running[-1] and not self.pool.free_pages
            assert (follows and request.share_prefix and request.cached % size == 0) or pauses or plan.preempted
        if scheduler.waiting and not plan.preempted and len(scheduler.running) < scheduler.max_running:
            promised = sum(self.pool.pages_for(r.max_total) - len(r.pages) for r in scheduler.running)
            assert self.pool.free_pages - promised < self.pool.pages_for(scheduler.waiting[0].max_total)

    def check_pages(self):
        scheduler, size = self.scheduler, self.pool.page_size
        assert len(scheduler.running) <= scheduler.max_running
        slots = [r.slot for r in scheduler.running]
        assert len(set(slots)) == len(slots) and set(slots) <= set(range(scheduler.max_running))
        holders = Counter(page for r in scheduler.running for page in r.pages)
        assert all(self.pool.holders(page) == holders[page] for page in range(self.pool.num_pages))
        assert self.pool.free_pages == self.pool.num_pages - len(holders)
        places = {}
        for r in scheduler.running:
            assert self.pool.pages_for(r.cached) <= len(r.pages) <= self.pool.pages_for(r.length)
            assert len(set(r.pages)) == len(r.pages)
            table = scheduler.tables.lookup_table([r])
            assert table.dtype == "int32" and table.tolist() == [r.pages]
            for index, page in enumerate(r.pages):
                if holders[page] > 1:  # shared: full, computed and at one place
                    assert places.setdefault(page, index) == index and (index + 1) * size <= r.cached
