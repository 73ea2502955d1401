"""What holds of any conversation, in any template, with any tokenizer: where it begins, parts and ends."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bfpo_pl.data.encoding import RowEncoder
from bfpo_pl.data.rows import Row, RowError
from bfpo_pl.data.templates import ChatTemplate, OfficialTemplate
from bfpo_pl.data.truncation import DropLong, OfficialTruncation, Truncation

LONG = Truncation(100_000, 50_000)
MANY = settings(max_examples=80, deadline=None, derandomize=True, database=None)
TOKENIZERS = {
    "byte_level": lambda kit, folder: kit.byte_level(),
    "byte_level_without_bos": lambda kit, folder: kit.byte_level(bos=None, eos="<|im_end|>"),
    "sentencepiece_like": lambda kit, folder: kit.sentencepiece_like(),
    "sentencepiece": lambda kit, folder: kit.sentencepiece(folder),
    "sentencepiece_slow": lambda kit, folder: kit.sentencepiece(folder, slow=True),
    "unigram": lambda kit, folder: kit.unigram(),
}
LOSSLESS = ("byte_level", "byte_level_without_bos")  # decode gives back the very text
SPACED = ("sentencepiece_like", "sentencepiece", "sentencepiece_slow")  # a space before any text, and byte fallback
FAMILIES = ("CHATML", "LLAMA3", "GEMMA", "MISTRAL", "ZEPHYR", "PLAIN")

BLANK = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0" + "".join(map(chr, range(0xFE00, 0xFE10)))

pieces = st.sampled_from(
    [
        *("Open", "the", " window", "ab", "'s", "9", "…", "?", " ", "  ", "\n", "\n\n", "\r\n", "\t", "▁", "\u00a0"),
        *("👍🏽", "👩‍👩‍👧", "مرحبا", "\u202eabc\u202c", "你好", "é", "e\u0301", "\ufeff", "\u200b"),
        *("</s>", "<s>", "<|im_end|>", "<|im_start|>", "<|eot_id|>", "<end_of_turn>", "[/INST]", "<|assistant|>\n"),
        *("<0x0A>", "{{ x }}", "{% if %}", "<unk>"),
    ]
)
texts = st.one_of(
    st.lists(pieces, min_size=1, max_size=12).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
).filter(lambda text: any(letter.isprintable() and not letter.isspace() and letter not in BLANK for letter in text))


@st.composite
def rows(draw):
    """A conversation of up to three turns with a pair of responses; the text decides whether the row is of use."""
    turns = [{"role": "user", "content": draw(texts)}]
    for _ in range(draw(st.integers(0, 1))):
        turns += [{"role": "assistant", "content": draw(texts)}, {"role": "user", "content": draw(texts)}]
    chosen = draw(texts)
    rejected = draw(texts.filter(lambda text: text != chosen))
    return Row.pair(turns, chosen, rejected, origin="f:1")


policies = st.one_of(
    st.builds(
        lambda room, prompt, keep: Truncation(room + prompt, prompt, keep),
        st.integers(1, 60),
        st.integers(70, 100),  # at least what always stays
        st.sampled_from(["end", "start"]),
    ),
    st.builds(DropLong, st.integers(2, 120)),
    st.just(LONG),
)


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request, kit, tmp_path_factory):
    """Each of the tokenizers."""
    return TOKENIZERS[request.param](kit, tmp_path_factory.mktemp("tokenizer"))


def stops_of(tokenizer):
    """The stop tokens that a generation config would name."""
    known = tokenizer.get_vocab()
    return [known[token] for token in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>") if token in known]


@MANY
@given(data=st.data())
def test_standard_sequences(tokenizer, kit, data):
    """One prompt for all responses, one BOS, one stop token that ends a response unless it was cut, lengths kept."""
    row, truncation = data.draw(rows()), data.draw(policies)
    template = ChatTemplate(getattr(kit, data.draw(st.sampled_from(FAMILIES))))
    encoder = RowEncoder(tokenizer, template, truncation, stops_of(tokenizer))
    whole = RowEncoder(tokenizer, template, LONG, stops_of(tokenizer)).many([row])[0]
    tree = encoder.many([row])[0]
    if isinstance(whole, RowError):
        assert str(tree) == str(whole)
        contents = [turn.content for turn in row.prompt]
        in_text = any((tokenizer.bos_token or "\0") in text for text in (*contents, *row.responses))
        assert in_text if "beginning-of-sequence" in whole.reason else "tokenise alike" in whole.reason
        return
    stops = {tokenizer.eos_token_id, *stops_of(tokenizer)}
    assert whole.prompt_ids == encoder.prompt_ids(row.prompt)
    for ids in whole.response_ids:
        assert ids[-1] in stops
        assert stops.isdisjoint(ids[:-1])
        if tokenizer.bos_token_id is not None:
            assert [*whole.prompt_ids, *ids].count(tokenizer.bos_token_id) == 1
            assert whole.prompt_ids[0] == tokenizer.bos_token_id
    longest = len(whole.prompt_ids) + max(map(len, whole.response_ids))
    if longest <= truncation.max_length:
        assert tree == whole
        assert encoder.counts["prompts_cut"] == encoder.counts["responses_cut"] == 0
    elif isinstance(truncation, DropLong):
        assert (tree.field, tree.value) == ("length in tokens", str(longest))
    elif isinstance(tree, RowError):
        assert "identical once truncation cuts them" in tree.reason
    else:
        check_cut(encoder, tree, whole)


def check_cut(encoder, tree, whole):
    """A cut row: within its limits, BOS kept, and nothing but the responses' ends and the prompt's middle gone."""
    truncation, bos = encoder.truncation, encoder.tokenizer.bos_token_id
    assert len(tree.prompt_ids) + max(map(len, tree.response_ids)) <= truncation.max_length
    assert len(tree.prompt_ids) == min(len(whole.prompt_ids), truncation.max_prompt_length)
    assert (tree.prompt_ids[0] == bos) == (whole.prompt_ids[0] == bos)
    if truncation.keep == "end":
        kept = tree.prompt_ids[bos is not None :]
        assert whole.prompt_ids[-len(kept) :] == kept
    room = truncation.max_length - len(tree.prompt_ids)
    assert tree.response_ids == [ids[:room] for ids in whole.response_ids]
    assert encoder.counts["prompts_cut"] == (len(tree.prompt_ids) < len(whole.prompt_ids))
    assert encoder.counts["responses_cut"] == sum(len(ids) > room for ids in whole.response_ids)


@pytest.mark.parametrize("tokenizer", LOSSLESS, indirect=True)
@MANY
@given(data=st.data())
def test_the_text_comes_back(tokenizer, kit, data):
    """Decoded, prompt and response are the rendered conversation up to the first stop token, or all of it and EOS."""
    row = data.draw(rows())
    encoder = RowEncoder(
        tokenizer, ChatTemplate(getattr(kit, data.draw(st.sampled_from(FAMILIES)))), LONG, stops_of(tokenizer)
    )
    tree = encoder.many([row])[0]
    if isinstance(tree, RowError):
        return
    turns = encoder.template.conversation(row.prompt)
    prompt = encoder.tokens.render([turns], generation=True)[0]
    decoded = tokenizer.decode(tree.prompt_ids)
    assert decoded.removeprefix(tokenizer.bos_token or "") == prompt.removeprefix(tokenizer.bos_token or "")
    for text, ids in zip(row.responses, tree.response_ids, strict=True):
        full = encoder.tokens.render([[*turns, {"role": "assistant", "content": text}]], generation=False)[0]
        end = full[len(prompt) :]
        marks = [tokenizer.decode([stop]) for stop in {tokenizer.eos_token_id, *stops_of(tokenizer)}]
        first = min((end.index(mark) + len(mark) for mark in marks if mark in end), default=None)
        assert tokenizer.decode(ids) == (end + tokenizer.eos_token if first is None else end[:first])


@pytest.mark.parametrize("tokenizer", SPACED, indirect=True)
@MANY
@given(data=st.data())
def test_a_response_is_tokenised_as_it_stands_after_its_prompt(tokenizer, kit, data):
    """No space is put before it, whatever it begins with: its pieces spell the text, spaces as sentencepiece does."""
    text = data.draw(texts.filter(lambda text: "<0x" not in text))
    ids = RowEncoder(tokenizer, ChatTemplate(kit.PLAIN), LONG).tokens.continuations([text])[0]
    spelt = b""
    specials = set(tokenizer.all_special_ids)
    if specials & set(ids):
        return  # what stands beside special tokens is the tokenizer's own affair
    for piece in tokenizer.convert_ids_to_tokens(ids):
        spelt += bytes([int(piece[1:-1], 16)]) if piece[:3] == "<0x" and len(piece) == 6 else piece.encode()
    assert spelt.decode() == text.replace(" ", "▁")


@MANY
@given(data=st.data())
def test_official_sequences(tokenizer, kit, data):
    """Prompt and response together are the official code's sequence for each response, or the row is refused."""
    row = data.draw(rows())
    encoder = RowEncoder(tokenizer, OfficialTemplate(kit.ZEPHYR), LONG)
    tree = encoder.many([row])[0]
    turns = [{"role": "system", "content": ""}, *({"role": t.role, "content": t.content} for t in row.prompt)]

    def text(messages):
        return tokenizer.apply_chat_template(messages, chat_template=kit.ZEPHYR, tokenize=False)

    def ids(string):
        return tokenizer(string, add_special_tokens=False)["input_ids"]

    alone = ids(text(turns))
    fulls = [ids(text([*turns, {"role": "assistant", "content": response}])) for response in row.responses]
    ends = [len(alone) if full[: len(alone)] == alone else len(alone) - 1 for full in fulls]
    heads, tails = zip(*((full[:end], full[end:]) for full, end in zip(fulls, ends, strict=True)), strict=True)
    if isinstance(tree, RowError):
        assert heads[0] != heads[1] or tails[0] == tails[1]
        return
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    assert tree.prompt_ids == [*bos, *heads[0]] == [*bos, *heads[1]]
    assert tree.response_ids == [[*tail, tokenizer.eos_token_id] for tail in tails]


@MANY
@given(data=st.data())
def test_official_truncation(data):
    """The rule once more, step by step as the official code takes it."""
    max_prompt = data.draw(st.integers(1, 9))
    limit = max_prompt + data.draw(st.integers(1, 9))
    prompt = list(range(data.draw(st.integers(1, 20))))
    responses = [[*range(100, 100 + size)] for size in data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))]
    policy = OfficialTruncation(limit, max_prompt)
    if policy.fits(prompt, responses):
        assert len(prompt) + max(map(len, responses)) <= limit
        return
    longer = max(len(ids) for ids in responses)
    want_prompt, want = prompt, responses
    if len(want_prompt) + longer > limit:
        want_prompt = want_prompt[max(0, len(want_prompt) - max_prompt) :]
    if len(want_prompt) + longer > limit:
        want = [ids[: limit - max_prompt] for ids in responses]
    assert policy.fit(prompt, responses, 1, 0) == (want_prompt, want)
    assert len(want_prompt) + max(map(len, want)) <= limit
