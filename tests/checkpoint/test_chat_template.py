"""Chat templates: what real ones need works, what hostile ones try fails within seconds."""

import time
from datetime import datetime

import pytest

from cutp.checkpoint import ChatTemplate, template_limits
from cutp.errors import CheckpointError, RequestError

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi <b>! "}]


def render(source, messages=MESSAGES, **variables):
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(messages, **variables)


def test_chatml():
    source = (
        "{% for message in messages %}\n"
        "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' -}}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    start = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b>!<|im_end|>\n"
    assert render(source) == start + "<|im_start|>assistant\n"
    assert render(source, add_generation_prompt=False) == start


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token ~ 1 ~ eos_token }}", "<s>1</s>"),
        ("{{ {'a': 'é<&>', 'b': [1, 2.5, true, none]} | tojson }}", '{"a": "é<&>", "b": [1, 2.5, true, null]}'),
        ("{{ {'b': 1, 'a': [2]} | tojson(indent=2) }}", '{\n  "b": 1,\n  "a": [\n    2\n  ]\n}'),
        ("{% set ns = namespace(n=0, l=[]) %}{% for m in messages %}{% set ns.n = ns.n + loop.index %}"
         "{% set ns.l = ns.l + [m.role] %}{% endfor %}{{ ns.n }}{{ ns.l | join('/') }}", "3system/user"),
        ("{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i > 3 %}{% break %}{% endif %}"
         "{{ i }}{% endfor %}", "013"),
        ("{% macro f(x, y=2) %}[{{ x }}{{ y }}]{% endmacro %}{{ f(1) }}{{ f(x=3, y=4) }}", "[12][34]"),
        ("{% macro w() %}({{ caller() }}){% endmacro %}{% call w() %}in{% endcall %}", "(in)"),
        ("{% generation %}{{ messages[1].content }}{% endgeneration %}", " Hi <b>! "),
        ("{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | length }}", "1"),
        ("{{ messages[1:][0]['content'].split('<')[0].strip() }}", "Hi"),
        ("{{ 7 % 3 }}{{ 2 ** 5 }}{{ '-' * 3 }}", "132---"),
        ("{{ '%s|%5d' % ('x', 7) }}{{ '{}:{}'.format(1, 'b') }}", "x|    71:b"),
        ("{{ messages[0].missing is defined }}{{ missing }}{{ tools is none }}", "FalseTrue"),
        ("{{ strftime_now('%d %b %Y') }}", "05 Mar 2024"),
        ("{% set t %}a{{ 1 }}{% endset %}{{ t | upper }}", "A1"),
        ("{% for k, v in {'x': 1}.items() %}{{ k }}{{ v }}{% endfor %}{{ (1, 'a') }}{{ {'k': messages[0].role} }}",
         "x1(1, 'a'){'k': 'system'}"),
        ("{{ 'a,b' | replace(',', ';') }}{{ 'x\\ny' | indent(2) }}{{ [3, 1] | sort | first }}", "a;bx\n  y1"),
        ("{{ enable_thinking }}", "False"),
    ],
)
def test_features_that_real_templates_use(source, text):
    assert render(source, now=datetime(2024, 3, 5), enable_thinking=False) == text


def test_raise_exception_is_a_request_error():
    with pytest.raises(RequestError, match="Conversation roles must alternate"):
        render("{{ raise_exception('Conversation roles must alternate') }}")


BOMBS = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested silent loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested writing loops": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "loop filter": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "macro tree": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "macro text": "{% set s = 'a' * 1000000 %}{% macro f() %}{% for i in range(99999) %}{{ s }}{% endfor %}"
    "{% endmacro %}{% set x = f() %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "string times": "{{ 'a' * 10**10 }}",
    "constant string times": "{{ 'a' * 10000000000 }}",
    "number times string": "{{ 10000000000 * 'a' }}",
    "list times": "{{ ([1] * 10**9) | length }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "power of power": "{% set x = 9 ** 999 %}{% set x = x ** 999 %}{% set x = x ** 999 %}{{ x }}",
    "doubling with +": "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "doubling with ~": "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubling unrolled": "{% set s = 'abc' %}" + "{% set s = s ~ s %}" * 99 + "{{ s | length }}",
    "doubling set block": "{% set s = 'abc' %}" + "{% set s %}{{ s }}{{ s }}{% endset %}" * 99,
    "doubling list": "{% set s = [1] %}" + "{% set s = [s, s] %}" * 99 + "{{ s }}",
    "doubling tuple": "{% set s = (1, 2) %}" + "{% set s = (s, s) %}" * 99 + "{{ s | tojson }}",
    "doubling dict": "{% set s = {} %}" + "{% set s = {'a': s, 'b': s} %}" * 99 + "{{ s == 1 }}{{ s | string }}",
    "doubling dict()": "{% set s = {} %}" + "{% set s = dict(a=s, b=s) %}" * 99 + "{{ s }}",
    "doubling views": "{% set s = {'a': 1} %}" + "{% set s = {'a': s.items(), 'b': s.items()} %}" * 99 + "{{ s }}",
    "center filter": "{{ 'a' | center(1000000000) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "zfill": "{{ 'a'.zfill(1000000000) }}",
    "expandtabs": "{{ '\\t'.expandtabs(1000000000) }}",
    "percent width": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "format width": "{{ '{:1000000000}'.format(1) }}",
    "format nested width": "{{ '{:{w}}'.format(1, w=1000000000) }}",
    "format repeated": "{% set s = 'a' * 1000000 %}{{ ('{0}' * 100000).format(s) }}",
    "replace": "{% set s = 'a' * 1000000 %}{{ s.replace('a', s) }}",
    "replace empty": "{% set s = 'a' * 1000000 %}{{ s.replace('', s) }}",
    "replace filter": "{% set s = 'a' * 1000000 %}{{ s | replace('a', s) }}",
    "join": "{% set s = 'a' * 1000000 %}{{ s.join(s) }}",
    "join filter": "{% set s = 'a' * 1000000 %}{{ s | join(s) }}",
    "join range": "{% set s = 'a' * 1000000 %}{{ range(99999) | join(s) }}",
    "map": "{% set s = 'a' * 1000000 %}{{ range(99999) | map('replace', '1', s) | list | length }}",
    "indent": "{{ ('\\n' * 100000) | indent(100000) }}",
    "indent json": "{{ [[1]] | tojson(indent=1000000000) }}",
    "batch": "{{ [1] | batch(1000000000, 'x') | list }}",
    "sum of lists": "{{ ([[1]] * 100000) | sum(start=[]) }}",
    "lipsum": "{{ lipsum(n=1000000) }}",
    "translate": "{{ ('a' * 1000000).translate({97: 'a' * 1000000}) }}",
    "to_bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "round": "{{ 1 | round(1000000000) }}{{ 1 | round(-1000000000) }}",
    "date width": "{{ strftime_now('%1000000000d') }}",
    "self reference": "{% set ns = namespace() %}{% set ns.a = ns %}{% for i in range(99999) %}{{ ns }}" + "x" * 1000
    + "{% endfor %}",
    "deep list": "{% set n = namespace(l=[]) %}{% for i in range(99999) %}{% set n.l = [n.l] %}{% endfor %}{{ n.l }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_with_an_error_in_seconds(name, monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(RequestError):
        render(BOMBS[name])
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ (''|attr('__class__')).mro() }}",
        "{{ raise_exception.__globals__['__builtins__'] }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ '{0.__class__.__mro__}'['format']('') }}",
        "{{ self.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{% include '/etc/hostname' %}",
        "{% import 'os' as os %}",
        "{{ cycler.__init__.__globals__.os.popen('true') }}",
        "{{ strftime_now.__func__ }}{{ strftime_now.__self__.loader }}",
    ],
)
def test_sandbox_escapes_fail(source):
    with pytest.raises(RequestError):
        render(source)


def test_messages_stay_as_they_were():
    messages = [{"role": "user", "content": ["a"]}]
    with pytest.raises(RequestError):
        render("{{ messages[0].content.append('b') }}", messages)
    assert messages == [{"role": "user", "content": ["a"]}]


@pytest.mark.parametrize(
    ("messages", "word"),
    [
        ([], "non-empty"),
        ("hello", "non-empty list"),
        ({"role": "user"}, "non-empty list"),
        (["hello"], r"messages\[0\]"),
        ([{"role": "user", "content": ""}, {"content": "x"}], r"messages\[1\]"),
        ([{"role": 3}], "role"),
        ([{"role": "user", "content": object()}], r"messages\[0\].content is a object"),
        ([{"role": "user", 3: "x"}], "key"),
    ],
)
def test_malformed_messages(messages, word):
    with pytest.raises(RequestError, match=word):
        render("x", messages)


def test_deeply_nested_message():
    value = []
    for _ in range(5000):
        value = [value]
    with pytest.raises(RequestError, match="nested"):
        render("x", [{"role": "user", "content": value}])


@pytest.mark.parametrize(
    "source",
    ["{% for %}", "{{ x", "{% if true %}" * 3000, "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% nosuchtag %}",
     "{{ 1 | nosuchfilter }}", "{{ x" + " | upper" * 20000 + " }}", "a" * 1_000_001],
)  # fmt: skip
def test_templates_that_do_not_compile(source):
    with pytest.raises(CheckpointError):
        ChatTemplate(source)


def test_one_rendering_does_not_use_up_the_next(monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_STEPS", 10_000)
    template = ChatTemplate("{% for i in range(n) %}{{ i }}{% endfor %}")
    for _ in range(5):
        assert template.render(MESSAGES, n=3000)
    with pytest.raises(RequestError, match="steps"):
        template.render(MESSAGES, n=9000)


def test_long_conversation_is_within_the_limits():
    messages = [{"role": "user", "content": "word " * 50}] * 4000
    source = (
        "{% set ns = namespace(l=[]) %}{% for m in messages[:500] %}{% set ns.l = ns.l + [m] %}{% endfor %}"
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m['content'] | trim + eos_token }}{% endfor %}"
    )
    assert render(source, messages).startswith("<|user|>word word")


class TestLoad:
    def test_none(self, tmp_path):
        assert ChatTemplate.load(tmp_path) is None
        (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "x"}')
        assert ChatTemplate.load(tmp_path) is None

    def test_string_list_and_file(self, tmp_path):
        config = tmp_path / "tokenizer_config.json"
        config.write_text('{"chat_template": "A{{ bos_token }}", "bos_token": {"content": "<s>"}}')
        assert ChatTemplate.load(tmp_path).render(MESSAGES) == "A<s>"
        config.write_text('{"chat_template": [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]}')
        assert ChatTemplate.load(tmp_path).render(MESSAGES) == "D"
        (tmp_path / "chat_template.jinja").write_text("F")
        assert ChatTemplate.load(tmp_path).render(MESSAGES) == "F"

    @pytest.mark.parametrize(
        "value", ["3", "{}", '[{"name": "rag", "template": "R"}]', '[{"name": 1}]', '["x"]', '"{% for %}"']
    )
    def test_malformed(self, tmp_path, value):
        (tmp_path / "tokenizer_config.json").write_text('{"chat_template": ' + value + "}")
        with pytest.raises(CheckpointError, match="chat"):
            ChatTemplate.load(tmp_path)

    def test_file_that_is_too_large_or_not_text(self, tmp_path):
        (tmp_path / "chat_template.jinja").write_text("a" * 1_000_001)
        with pytest.raises(CheckpointError, match="larger"):
            ChatTemplate.load(tmp_path)
        (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
        with pytest.raises(CheckpointError, match="UTF-8"):
            ChatTemplate.load(tmp_path)
