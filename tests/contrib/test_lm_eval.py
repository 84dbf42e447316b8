"""The adapter to the evaluation harness: equal to the harness with Hugging Face's model (golden file)."""

import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the harness is imported
pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from cutp import LLM, run_threads
from cutp.contrib.lm_eval import CutpLM
from cutp.errors import ClosedError, ConfigError, RequestError
from tests.contrib.offline_tasks import GENERATION, MAX_LENGTHS, PAIRS, ROLLING, TASKS

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "lm_eval.json").read_text())
TEMPLATE = ("{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}{{ raise_exception('late') }}"
            "{% endif %}<{{ m['role'] }}>{{ m['content'].strip() }}</s>{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}")


@pytest.fixture(scope="module")
def lm():
    with CutpLM() as lm:
        yield lm


def instances(kind, requests):
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(requests)]


def evaluate(lm, **options):
    # Without the harness's own tasks, whose files take seconds to list.
    return simple_evaluate(lm, tasks=TASKS, bootstrap_iters=0, task_manager=TaskManager(include_defaults=False),
                           **options)


def pairs(*requests):
    return instances("loglikelihood", requests)


class Recorder:
    """Passes calls on to an LLM, and keeps the pairs that are scored."""

    def __init__(self, llm):
        self._llm = llm
        self.scored = []

    def score(self, values):
        self.scored += values
        return self._llm.score(values)

    def __getattr__(self, name):
        return getattr(self._llm, name)


@pytest.fixture
def recorded(lm, monkeypatch):
    """The adapter with a small context, and the list of the pairs it has scored."""
    recorder = Recorder(lm.llm)
    monkeypatch.setattr(lm, "llm", recorder)
    monkeypatch.setattr(lm, "_max_length", 8)
    return lm, recorder.scored


def assert_requests(lm, golden):
    found = lm.loglikelihood(pairs(*PAIRS), disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in golden["loglikelihood"]]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in golden["loglikelihood"]], abs=1e-3)
    rolled = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in ROLLING]))
    assert rolled == pytest.approx(golden["rolling"], rel=1e-5, abs=1e-3)
    assert lm.generate_until(instances("generate_until", GENERATION)) == golden["generation"]


def assert_tasks(found):
    for task in TASKS:
        name = task["task"]
        results = {key: value for key, value in found["results"][name].items() if isinstance(value, float)}
        assert results == pytest.approx(GOLDEN["tasks"][name]["results"], rel=1e-4)
        got, expected = ([sample for document in documents for sample in document] for documents in
                         ([s["resps"] for s in found["samples"][name]], GOLDEN["tasks"][name]["responses"]))
        for one, other in zip(flat(got), flat(expected), strict=True):
            assert one == (pytest.approx(other, rel=1e-5, abs=1e-3) if isinstance(other, float) else other)


def flat(value):
    return [leaf for each in value for leaf in flat(each)] if isinstance(value, (list, tuple)) else [value]


@pytest.mark.parametrize("max_length", MAX_LENGTHS)
def test_requests_equal_hugging_face(max_length):
    with CutpLM(max_length=max_length) as lm:
        assert lm.max_length == (max_length or 1024)
        assert_requests(lm, GOLDEN["requests"][json.dumps(max_length)])


def test_tasks_equal_hugging_face(lm):
    found = evaluate(lm)
    assert_tasks(found)
    assert found["config"]["model"] == "CutpLM"


@pytest.mark.parametrize("ranks,tp", [(2, 2), (3, 1)])
def test_ranks_that_follow(ranks, tp):
    def rank_main(comm):
        with CutpLM(comm=comm, tp=tp) as lm:
            if not lm.is_root:
                lm.follow()
                return "released"
            assert (lm.rank, lm.world_size) == (0, 1)
            assert_requests(lm, GOLDEN["requests"]["null"])
            found = evaluate(lm)
        with pytest.raises(ClosedError):
            lm.llm.score("a")
        return found

    found, *others = run_threads(ranks, rank_main, timeout=120)
    assert_tasks(found)
    assert others == ["released"] * (ranks - 1)


@pytest.mark.parametrize("calls", [0, 1])
def test_an_error_on_rank_0_releases_the_others(calls):
    def rank_main(comm):
        try:
            with CutpLM(comm=comm) as lm:
                if not lm.is_root:
                    lm.follow()
                    return "released"
                for _ in range(calls):
                    with pytest.raises(RequestError):
                        lm.llm.score([("a", "")])
                raise KeyError("no such task")
        except KeyError:
            return "raised"

    assert run_threads(2, rank_main, timeout=20) == ["raised", "released"]


def test_rolling_predicts_every_token_once(recorded):
    lm, scored = recorded
    for length in (1, 7, 8, 9, 16, 17):
        del scored[:]
        text = "the king " * length
        lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))
        ids = lm.tok_encode(text)
        assert [token for _, continuation in scored for token in continuation] == ids
        assert scored[0][0] == [lm.prefix_token_id]
        whole = [lm.prefix_token_id, *ids]
        end = 1
        for context, continuation in scored:
            end += len(continuation)
            begin = end - len(context) - len(continuation)
            assert whole[begin:end] == context + continuation
            assert begin == 0 or len(context) + len(continuation) == 9  # all the context there is room for


def test_an_empty_context_is_the_prefix_token(recorded, monkeypatch):
    lm, scored = recorded
    ids = lm.tok_encode("rain", add_special_tokens=False)
    lm.loglikelihood(pairs(("", "rain"), ("", "<s>rain")), disable_tqdm=True)
    assert scored == [([1], ids), ([1], ids)]
    monkeypatch.setattr(lm, "_prefix_token_id", 17)
    lm.loglikelihood(pairs(("", "rain")), disable_tqdm=True)
    assert scored[2] == ([17], ids)


def test_a_long_context_loses_its_beginning(recorded):
    lm, scored = recorded
    lm._loglikelihood_tokens([(None, [*range(10, 30)], [5, 6]), (None, [*range(10, 17)], [5, 6]),
                              (None, [7], [5] * 8)])
    assert scored == [([*range(23, 30)], [5, 6]), ([*range(10, 17)], [5, 6]), ([7], [5] * 8)]
    with pytest.raises(RequestError, match="9 tokens does not fit into the context of 8"):
        lm._loglikelihood_tokens([(None, [7], [5] * 9)])


def test_special_tokens(lm):
    assert lm.tok_encode("The king") == [1, *lm.tok_encode("The king", add_special_tokens=False)]
    assert lm.tok_encode("<s>The king")[:2] != [1, 1]
    with CutpLM(add_bos_token=False) as other:
        assert other.tok_encode("The king") == lm.tok_encode("The king", add_special_tokens=False)
        assert other.tok_encode("The king", add_special_tokens=True) == lm.tok_encode("The king")
    assert (lm.eot_token_id, lm.prefix_token_id, lm.max_gen_toks) == (2, 1, 256)


def test_sampling_repeats_with_the_seed():
    request = ("Once upon a time", {"until": [], "max_gen_toks": 8, "temperature": 1.2, "do_sample": True})

    def run(seed):
        with CutpLM(seed=seed) as lm:
            return lm.generate_until(instances("generate_until", [request] * 3))

    first = run(5)
    assert run(5) == first != run(6) and len(set(first)) == 3


def test_no_room_for_a_prompt(lm):
    with pytest.raises(RequestError, match="max_gen_toks is 1024, which leaves no room"):
        lm.generate_until(instances("generate_until", [("a", {"max_gen_toks": 1024})]))


def test_answers_are_cached(lm, tmp_path):
    first = evaluate(lm, use_cache=str(tmp_path / "cache"))
    passes = lm.llm.stats()["steps"]
    assert_tasks(first)
    assert_tasks(evaluate(lm, use_cache=str(tmp_path / "cache")))
    assert lm.llm.stats()["steps"] == passes


def test_chat_template(tales_copy, lm):
    (tales_copy / "chat_template.jinja").write_text(TEMPLATE)
    user, system = {"role": "user", "content": " Hi "}, {"role": "system", "content": "Be brief."}
    with CutpLM(tales_copy) as chat:
        assert chat.apply_chat_template([user]) == "<user>Hi</s><assistant>"
        open_end = [user, {"role": "assistant", "content": "Once upon "}]
        assert chat.apply_chat_template(open_end, add_generation_prompt=False) == "<user>Hi</s><assistant>Once upon"
        assert chat.apply_chat_template([system, user]) == "<system>Be brief.</s><user>Hi</s><assistant>"
        assert chat.apply_chat_template([user, system]) == "<user>Hi</s><assistant>"
        assert chat.chat_template(True) == TEMPLATE and chat.chat_template(False) == ""
        assert "/" not in chat.tokenizer_name and chat.tokenizer_name.endswith("tales")
        evaluate(chat, apply_chat_template=True)
    with pytest.raises(RequestError, match="no chat template"):
        lm.apply_chat_template([user])


def test_a_model_that_cannot_be_evaluated(tiny):
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        CutpLM(tiny("mha"))
    for length in (1, 1025):
        with pytest.raises(ConfigError, match=f"max_length={length} is not from 2 to 1024"):
            CutpLM(max_length=length)


def test_an_open_llm_is_taken_over():
    llm = LLM()
    with CutpLM(llm) as lm:
        assert lm.llm is llm
    with pytest.raises(ClosedError):
        llm.score("a")


def test_every_answer_is_kept_as_it_comes(lm, monkeypatch):
    """What the harness's cache gets while requests run, so that an evaluation that was killed goes on."""
    kept = []

    class Hook:
        def add_partial(self, kind, request, answer):
            kept.append((kind, request, answer))

    monkeypatch.setattr(lm, "cache_hook", Hook())
    settings = {"max_gen_toks": 2}
    answers = [*lm.loglikelihood(pairs(PAIRS[0], PAIRS[3]), disable_tqdm=True),
               *lm.loglikelihood_rolling(instances("loglikelihood_rolling", [("a",)])),
               *lm.generate_until(instances("generate_until", [("The king", settings)]))]
    assert kept == [("loglikelihood", PAIRS[0], answers[0]), ("loglikelihood", PAIRS[3], answers[1]),
                    ("loglikelihood_rolling", ("a",), answers[2]),
                    ("generate_until", ("The king", settings), answers[3])]


def test_text_is_decoded_without_its_prompt(tales_copy):
    """As the harness does it: a tokenizer whose decoder drops the first space of a text drops it here too."""
    path = tales_copy / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["decoder"] = {"type": "Sequence", "decoders": [
        settings["decoder"], {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
    path.write_text(json.dumps(settings))
    with CutpLM(tales_copy) as lm:
        [text] = lm.generate_until(instances("generate_until", GENERATION[:1]))
    assert text == GOLDEN["requests"]["null"]["generation"][0].removeprefix(" ")


def test_small_chunks(monkeypatch):
    monkeypatch.setattr("cutp.contrib.lm_eval._CHUNK_TOKENS", 40)
    with CutpLM(max_length=9) as lm:
        assert_requests(lm, GOLDEN["requests"]["9"])
