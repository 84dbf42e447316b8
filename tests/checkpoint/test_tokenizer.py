"""Tokenizers of the three kinds in use, and text in pieces equal to text at once."""

import json
import random
import time

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from cutp.checkpoint import Detokenizer, Tokenizer, resolve_model
from cutp.errors import CheckpointError, InvalidTokenError, RequestError

LINES = ["the cat sat on the mat", "once upon a time there was a little dog", "naïve café", "hello, world!"] * 20
FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467"  # one emoji of five code points
TEXTS = ["the little cat", "  two  spaces ", f"naïve 😀 dog {FAMILY}", "日本語と中文 the end", "a\nb\tc"]
TEXTS += ["", " ", "é", "\ufffd literal \ufffd"]


def byte_level():
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_tokens(["<tool>", "日本"])
    return tokenizer


def sentencepiece(byte_fallback=True):
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for b in range(256) if byte_fallback else ():
        vocab[f"<0x{b:02X}>"] = len(vocab)
    for character in "▁abcdefghijklmnopqrstuvwxyz,!.":
        vocab[character] = len(vocab)
    merges = []
    for a, b in [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "c"), ("a", "t"), ("▁c", "at"), ("▁", "▁")]:
        vocab[a + b] = len(vocab)
        merges.append((a, b))
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback)
    )
    if byte_fallback:  # the form of Llama 2
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def byte_level_in_a_sequence():
    tokenizer = byte_level()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip("_", 0, 0)])
    return tokenizer


KINDS = {
    "byte level": byte_level,
    "byte fallback": sentencepiece,
    "metaspace": lambda: sentencepiece(False),
    "byte level in a sequence": byte_level_in_a_sequence,
    "bundled": None,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    if KINDS[request.param] is None:
        return Tokenizer.load(resolve_model(None))
    directory = tmp_path_factory.mktemp("tokenizer")
    KINDS[request.param]().save(str(directory / "tokenizer.json"))
    return Tokenizer(directory)


def pieces(tokenizer, prompt, generated, skip=True):
    detokenizer = Detokenizer(tokenizer, prompt, skip)
    return [*(detokenizer.push(i) for i in generated), detokenizer.flush()]


def beyond(tokenizer, prompt, generated, skip=True):
    before, after = tokenizer.decode(prompt, skip), tokenizer.decode([*prompt, *generated], skip)
    assert after.startswith(before)
    return after[len(before) :]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_whole(tokenizer, text):
    ids = tokenizer.encode(text)
    for cut in range(len(ids) + 1):
        prompt, generated = ids[:cut], ids[cut:]
        if tokenizer.decode(prompt).endswith("\ufffd"):
            continue  # a character split between prompt and text has a test of its own
        assert "".join(pieces(tokenizer, prompt, generated)) == beyond(tokenizer, prompt, generated)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_text_and_special_tokens(tokenizer, data):
    choices = ["the", " cat", " ", "日本", "😀", "é", "<s>", "</s>", "x"]
    parts = data.draw(st.lists(st.sampled_from(choices), max_size=8))
    ids = [i for part in parts for i in tokenizer.encode(part)]
    cut = data.draw(st.integers(0, len(parts)))
    prompt = [i for part in parts[:cut] for i in tokenizer.encode(part)]
    for skip in (True, False):
        assert "".join(pieces(tokenizer, prompt, ids[len(prompt) :], skip)) == beyond(
            tokenizer, prompt, ids[len(prompt) :], skip
        )


def test_random_tokens(tokenizer):
    rng = random.Random(1)
    settings = json.dumps(tokenizer.decoder_settings)
    fallback = "ByteFallback" in settings
    if "ByteLevel" in settings and "Strip" in settings:
        pytest.skip("the number of replacement characters is not promised; see Detokenizer")
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(30))]
        if fallback:  # where a run of byte tokens turns bad late, text already given stays; see Detokenizer
            ids = [i for i in ids if not (tokenizer.id_to_token(i) or "").startswith("<0x")]
        assert "".join(pieces(tokenizer, [], ids)) == tokenizer.decode(ids)


def test_characters_come_whole_and_at_once(tokenizer):
    text = "the 😀 日本語"
    ids = tokenizer.encode(text)
    if "\ufffd" in tokenizer.decode(ids) or tokenizer.decode(ids) != text:
        pytest.skip("this vocabulary cannot write the text")
    seen = pieces(tokenizer, [], ids)
    assert not any("\ufffd" in piece for piece in seen)
    assert seen[-1] == ""  # nothing is held back at the end
    assert any(piece == "" for piece in seen[:-1])


@pytest.mark.parametrize("kind", ["byte level", "byte fallback", "byte level in a sequence"])
def test_incomplete_characters(tmp_path, kind):
    KINDS[kind]().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    ids = tokenizer.encode("cat 😀", add_special_tokens=False)
    for keep in (1, 2, 3):
        cut = ids[: len(ids) - keep]
        assert "".join(pieces(tokenizer, ids[:1], cut[1:])) == beyond(tokenizer, ids[:1], cut[1:])
        assert "".join(pieces(tokenizer, ids[:1], cut[1:])).endswith("\ufffd")
        # an interrupted character, then text
        mixed = cut + tokenizer.encode("the", add_special_tokens=False)[-1:]
        assert "".join(pieces(tokenizer, [], mixed)) == tokenizer.decode(mixed)
    if kind != "byte level in a sequence":  # begun in the prompt, completed by the generated tokens
        assert pieces(tokenizer, ids[:-2], ids[-2:]) == ["", "😀", ""]


def test_text_already_given_is_not_taken_back(tmp_path):
    sentencepiece().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    run = [tokenizer.token_to_id(f"<0x{b:02X}>") for b in "é".encode() + b"\xff\x80"]
    the = tokenizer.token_to_id("▁the")
    assert pieces(tokenizer, [the], [*run, the]) == ["", "é", "\ufffd", "\ufffd", " the", ""]


def test_leading_space_survives_after_a_prompt(tmp_path):
    sentencepiece().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    cat, end = tokenizer.token_to_id("▁cat"), tokenizer.token_to_id("</s>")
    assert pieces(tokenizer, [], [cat, cat]) == ["cat", " cat", ""]
    assert pieces(tokenizer, [cat], [cat]) == [" cat", ""]
    assert pieces(tokenizer, [cat, end], [end, cat]) == ["", " cat", ""]
    assert pieces(tokenizer, [cat] + [end] * 100, [cat]) == [" cat", ""]
    assert pieces(tokenizer, [cat], [2**31, cat]) == ["", " cat", ""]  # an id without a token shows nothing


@pytest.mark.parametrize("token", ["the", "byte", "special"])
def test_cost_per_token_does_not_grow(tokenizer, token):
    if token == "byte":  # invalid UTF-8 for ever
        wanted = ("Ģ", "<0x80>", "▁")
        ids = [next(i for i in map(tokenizer.token_to_id, wanted) if i is not None)]
    else:
        ids = [tokenizer.token_to_id("</s>")] if token == "special" else tokenizer.encode("the", False)[-1:]
    detokenizer = Detokenizer(tokenizer, [])
    decoded = []
    backend_decode = tokenizer.decode
    tokenizer.decode = lambda ids, **options: (decoded.append(len(ids)), backend_decode(ids, **options))[1]
    start = time.process_time()
    try:
        for _ in range(3000):
            detokenizer.push(ids[0])
    finally:
        del tokenizer.decode
    assert max(decoded, default=0) <= 16 and len(decoded) <= 3000 * 6
    assert time.process_time() - start < 5


def test_encoding(tokenizer):
    batch = tokenizer.encode_batch(["the cat", "", "the"])
    assert batch == [tokenizer.encode(t) for t in ("the cat", "", "the")]
    assert all(type(i) is int for i in batch[0])
    assert tokenizer.id_to_token(tokenizer.token_to_id("<s>")) == "<s>"
    assert tokenizer.decode([tokenizer.token_to_id("<s>")]) == ""
    assert tokenizer.decode([tokenizer.token_to_id("<s>")], skip_special_tokens=False) == "<s>"
    for bad in ("\ud83d", "ok\udfff"):
        with pytest.raises(RequestError, match="surrogate"):
            tokenizer.encode(bad)
    with pytest.raises(RequestError, match="int"):
        tokenizer.encode(3)
    for ids in ([-1], [2**40], ["x"]):
        with pytest.raises(InvalidTokenError):
            tokenizer.decode(ids)
    assert tokenizer.decode([2**31]) == ""


def test_bundled_tokenizer():
    tokenizer = Tokenizer.load(resolve_model(None))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 3)
    assert tokenizer.vocab_size == 4096
    assert tokenizer.encode("Once")[0] == 1 and tokenizer.encode("Once", add_special_tokens=False)[0] != 1
    assert tokenizer.decode(tokenizer.encode("Once upon a time")) == "Once upon a time"


def test_truncation_and_padding_are_off(tmp_path):
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    text = "once upon a time there was a dog"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([text, "a"])[1] == tokenizer.encode("a")


def test_special_tokens(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).special_tokens == {} and Tokenizer(tmp_path).bos_token_id is None
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "</s>", "eos_token": {"content": "</s>"}}')
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<s>", "lstrip": False}, "pad_token": None, "add_bos_token": True})
    )
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, None)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": 3}')
    with pytest.raises(CheckpointError, match="bos_token"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b'{"model": 3}', b"{" * 100_000])
def test_damaged_file(tmp_path, data):
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(CheckpointError, match="tokenizer.json is damaged"):
        Tokenizer(tmp_path)


def test_truncated_file_and_no_file(tmp_path):
    assert Tokenizer.load(tmp_path) is None
    with pytest.raises(CheckpointError, match="tokenizer.json"):
        Tokenizer(tmp_path)
    text = byte_level().to_str()
    (tmp_path / "tokenizer.json").write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match="tokenizer.json is damaged"):
        Tokenizer.load(tmp_path)
