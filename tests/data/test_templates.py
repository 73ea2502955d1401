import random

import pytest

from bfpo_pl.data.rows import Message, Row
from bfpo_pl.data.templates import ChatTemplate, RowEncoder, TemplateError, Truncation
from bfpo_pl.microworld import build_tokenizer, safety_rows

TOKENIZERS = {
    "chatml": lambda kit: (kit.byte_level(bos=None, eos="<|im_end|>"), kit.CHATML),
    "chatml_bos": lambda kit: (kit.byte_level(bos="<s>", eos="<|im_end|>"), kit.CHATML),
    "no_eos_in_template": lambda kit: (kit.byte_level(), kit.PLAIN),
    "zephyr": lambda kit: (kit.byte_level(), kit.ZEPHYR),
    "zephyr_sentencepiece": lambda kit: (kit.sentencepiece_like(), kit.ZEPHYR),
    "bos_in_template": lambda kit: (kit.byte_level(), "{{ bos_token }}" + kit.PLAIN),
}
LONG = Truncation(100_000, 50_000)


@pytest.fixture(scope="module", params=TOKENIZERS)
def encoder(request, kit):
    tokenizer, template = TOKENIZERS[request.param](kit)
    return RowEncoder(tokenizer, ChatTemplate(template, system="Be good."), LONG)


def random_rows(texts, count, seed=0):
    draw = random.Random(seed)
    words = [*texts, "  ", "\n", "\n\n", "\t", "👍🏽", "مرحبا", "\r\n", "a", "9", "'s"]

    def text(extra=""):
        return "".join(draw.choice(words) + draw.choice(["", " "]) for _ in range(draw.randint(1, 12))) + extra

    for number in range(count):
        turns = [{"role": "user", "content": text("?")}]
        for _ in range(draw.randint(0, 2)):
            turns += [{"role": "assistant", "content": text("!")}, {"role": "user", "content": text("?")}]
        yield Row.pair(turns, text(f"x{number}"), text(f"y{number}"), origin=f"row {number}")


def test_boundary_and_special_tokens(encoder, kit):
    """The prompt is tokenised once, BOS stands once and first, one stop token ends each response."""
    tokenizer = encoder.tokenizer
    for row in random_rows(" ".join(kit.TEXTS).split(" "), 30):
        tree = encoder(row)
        assert tree.prompt_ids == encoder.prompt_ids(row.prompt)
        if tokenizer.bos_token_id is not None:
            for ids in tree.response_ids:
                assert [*tree.prompt_ids, *ids].count(tokenizer.bos_token_id) == 1
            assert tree.prompt_ids[0] == tokenizer.bos_token_id
        for ids in tree.response_ids:
            assert ids[-1] == tokenizer.eos_token_id
            assert ids.count(tokenizer.eos_token_id) == 1


def test_many_rows_together_are_encoded_as_one_by_one(encoder, kit):
    rows = list(random_rows(" ".join(kit.TEXTS).split(" "), 20, seed=2))
    rows += [Row.single("one", "a</s>b"), Row((Message("user", "three"),), ("a", "b", "c"), ((2, 0),))]
    for truncation in (LONG, Truncation(90, 60), Truncation(90, 60, "start")):
        together, alone = (RowEncoder(encoder.tokenizer, encoder.template, truncation) for _ in range(2))
        assert together.many(rows) == [alone(row) for row in rows]
        assert together.counts == alone.counts
        assert (truncation is LONG) == (together.counts["prompts_cut"] == 0)


def test_text_comes_back(encoder, kit):
    """decode(prompt) and decode(response) together are the rendered text up to the first stop token."""
    tokenizer = encoder.tokenizer
    if tokenizer.unk_token is not None:
        pytest.skip("the sentencepiece-like tokenizer does not keep white space as it is")
    for row in random_rows(" ".join(kit.TEXTS).split(" "), 30, seed=1):
        tree = encoder(row)
        turns = [{"role": "system", "content": "Be good."}]
        turns += [{"role": turn.role, "content": turn.content} for turn in row.prompt]
        prompt = encoder._rendered(turns, generation=True)
        for text, ids in zip(row.responses, tree.response_ids, strict=True):
            full = encoder._rendered([*turns, {"role": "assistant", "content": text}], generation=False)
            decoded = tokenizer.decode(tree.prompt_ids) + tokenizer.decode(ids[:-1])
            if not prompt.startswith(tokenizer.bos_token or "\0"):
                decoded = decoded.removeprefix(tokenizer.bos_token or "")
            assert full.startswith(decoded)
            rest = full[len(decoded) :]
            assert rest.strip() in ("", tokenizer.eos_token)
            assert text in decoded


def test_zephyr_by_hand(kit):
    """The paper's template: the header belongs to the prompt, one end token, nothing after it."""
    tokenizer = kit.byte_level()
    tree = RowEncoder(tokenizer, ChatTemplate(kit.ZEPHYR, system=""), LONG)(Row.pair("PROMPT", "RESP", "OTHER"))
    assert tokenizer.decode(tree.prompt_ids) == "<s><|system|>\n</s>\n<|user|>\nPROMPT</s>\n<|assistant|>\n"
    assert [tokenizer.decode(ids) for ids in tree.response_ids] == ["RESP</s>", "OTHER</s>"]


def test_zephyr_agrees_with_the_official_tokens(shared_data, kit):
    """Rendered text as recorded from the official code, except where ours ends at the first end token."""
    import json

    expected = json.loads((shared_data.parent / "vectors" / "bfpo_vectors.json").read_text())["tokenisation"]
    tokenizer = kit.byte_level()
    tree = RowEncoder(tokenizer, ChatTemplate(kit.ZEPHYR, system=""), LONG)(Row.single("PROMPT", "RESP"))
    assert tokenizer.decode(tree.prompt_ids) == "<s>" + expected["prompt_with_generation_prompt"]
    assert tokenizer.decode([*tree.prompt_ids, *tree.response_ids[0]]) + "\n" == (
        "<s>" + expected["prompt"] + expected["response"]
    )


def test_sentencepiece_puts_no_space_before_a_response(kit):
    tokenizer = kit.sentencepiece_like()
    encoder = RowEncoder(tokenizer, ChatTemplate(kit.ZEPHYR), LONG)
    ids = encoder(Row.single("Open", "window")).response_ids[0]
    assert tokenizer.convert_ids_to_tokens(ids)[0] != "▁window"
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == "window</s>"


def test_system_message_policy(kit):
    tokenizer = kit.byte_level(bos=None, eos="<|im_end|>")
    own = [{"role": "system", "content": "Own."}, {"role": "user", "content": "Hi"}]

    def start(system, prompt):
        encoder = RowEncoder(tokenizer, ChatTemplate(kit.CHATML, system=system), LONG)
        return tokenizer.decode(encoder(Row.single(prompt, "x")).prompt_ids).split("<|im_end|>")[0]

    assert start(None, "Hi") == "<|im_start|>user\nHi"
    assert start("Be good.", "Hi") == "<|im_start|>system\nBe good."
    assert start("", "Hi") == "<|im_start|>system\n"
    assert start("Be good.", own) == "<|im_start|>system\nOwn."


def test_further_stop_tokens(kit):
    tokenizer = kit.byte_level(bos=None, eos="</s>")
    row = Row.single("Hi", "x")
    plain = RowEncoder(tokenizer, ChatTemplate(kit.CHATML), LONG)(row).response_ids[0]
    assert tokenizer.decode(plain) == "x<|im_end|>\n</s>"
    cut = RowEncoder(tokenizer, ChatTemplate(kit.CHATML, stop_tokens=["<|im_end|>"]), LONG)(row).response_ids[0]
    assert tokenizer.decode(cut) == "x<|im_end|>"
    with pytest.raises(TemplateError, match="no token"):
        RowEncoder(tokenizer, ChatTemplate(kit.CHATML, stop_tokens=["<nothing>"]), LONG)


def test_template_files_and_errors(tmp_path, kit):
    tokenizer = kit.byte_level()
    with pytest.raises(TemplateError, match=r"Set data\.template\.chat_template"):
        RowEncoder(tokenizer, ChatTemplate(), LONG)
    with pytest.raises(TemplateError, match="neither a jinja template nor a file"):
        RowEncoder(tokenizer, ChatTemplate(str(tmp_path / "absent.jinja")), LONG)
    path = tmp_path / "chat.jinja"
    path.write_text(kit.PLAIN)
    row = Row.single("Hi", "x")
    from_file, given = (RowEncoder(tokenizer, ChatTemplate(source), LONG)(row) for source in (str(path), kit.PLAIN))
    assert from_file == given
    tokenizer.chat_template = kit.PLAIN
    assert RowEncoder(tokenizer, ChatTemplate(), LONG)(row) == given
    thinking = kit.CHATML.replace("assistant\n'", "assistant\n<think>'")
    with pytest.raises(TemplateError, match="part at character"):
        RowEncoder(kit.byte_level(None, "<|im_end|>"), ChatTemplate(thinking), LONG)(row)
    with_switch = "{% if loud is defined %}LOUD{% endif %}" + kit.PLAIN
    loud = RowEncoder(tokenizer, ChatTemplate(with_switch, kwargs={"loud": True}), LONG)(row)
    assert tokenizer.decode(loud.prompt_ids).startswith("<s>LOUD[user]")


@pytest.mark.parametrize("keep", ["end", "start"])
def test_truncation_keeps_the_prompt_common(keep, kit):
    tokenizer = kit.byte_level()
    whole = RowEncoder(tokenizer, ChatTemplate(kit.PLAIN), LONG)
    encoder = RowEncoder(tokenizer, ChatTemplate(kit.PLAIN), Truncation(60, 20, keep))
    row = Row.pair("0123456789" * 20, "short", "long " * 40)
    tree, full = encoder(row), whole(row)
    assert len(tree.prompt_ids) == 20
    header = tokenizer("[assistant] ", add_special_tokens=False)["input_ids"]
    assert tree.prompt_ids[0] == tokenizer.bos_token_id
    assert tree.prompt_ids[-len(header) :] == header
    if keep == "end":
        assert tree.prompt_ids[1:] == full.prompt_ids[-19:]
    else:
        assert tree.prompt_ids[: 20 - len(header)] == full.prompt_ids[: 20 - len(header)]
    assert tree.response_ids == [full.response_ids[0], full.response_ids[1][:40]]
    assert +encoder.counts == {"prompts_cut": 1, "responses_cut": 1}


def test_nothing_is_cut_that_fits(kit):
    tokenizer = kit.byte_level()
    row = Row.pair("a long prompt, longer than its share", "yes", "no")
    full = RowEncoder(tokenizer, ChatTemplate(kit.PLAIN), LONG)(row)
    size = len(full.prompt_ids) + max(map(len, full.response_ids))
    exact = RowEncoder(tokenizer, ChatTemplate(kit.PLAIN), Truncation(size, 5))
    assert exact(row) == full
    assert not +exact.counts
    shorter = RowEncoder(tokenizer, ChatTemplate(kit.PLAIN), Truncation(size - 1, size - 2))
    assert shorter(row).prompt_ids == full.prompt_ids
    assert +shorter.counts == {"responses_cut": 1}


def test_what_a_template_refuses_is_named():
    encoder = RowEncoder(build_tokenizer(), ChatTemplate(system="Be good."), Truncation())
    with pytest.raises(TemplateError, match=r"f:3: the chat template refuses a conversation of system, user: .*system"):
        encoder(Row.single("open the window", "no", "f:3"))
    fine = [{"role": "system", "content": "no"}, {"role": "user", "content": "open"}]
    with pytest.raises(TemplateError, match=r"^g:2: the chat template refuses a conversation of system, user:"):
        RowEncoder(build_tokenizer(), ChatTemplate(), Truncation()).many(
            [Row.single("open the window", "no", "g:1"), Row.single(fine, "no", "g:2")]
        )


def test_a_stop_token_in_the_text_is_counted(kit):
    tokenizer = kit.byte_level()
    encoder = RowEncoder(tokenizer, ChatTemplate(kit.ZEPHYR), LONG)
    tree = encoder(Row.pair("p", "one</s>two", "three"))
    assert tokenizer.decode(tree.response_ids[0]) == "one</s>"
    assert +encoder.counts == {"stop_token_in_text": 1}


def test_a_pair_that_is_the_same_in_tokens_is_a_fault(kit):
    tokenizer = kit.byte_level()

    def fault(chosen, rejected, truncation=LONG):
        encoder = RowEncoder(tokenizer, ChatTemplate(kit.PLAIN), truncation)
        row = Row.pair("p", chosen, rejected, origin="f:1")
        return encoder.fault(row, encoder(row))

    same = "the same beginning of both, "
    assert fault(same + "a", same + "b") is None
    cut = fault(same + "a", same + "b", Truncation(16, 15))
    assert (cut.origin, cut.field, cut.value) == ("f:1", "rejected", repr(same + "b"))
    assert cut.reason.endswith("identical once truncation cuts them (data.truncation.max_length = 16)")
    assert fault("ab", "cd" + same, Truncation(16, 15)) is None
    alike = fault("yes</s>one", "yes</s>another")
    assert alike.reason == "the chosen and the rejected response tokenise alike"
    row = Row((Message("user", "p"),), (same + "a", "x", same + "b"), ((1, 0),))
    encoder = RowEncoder(tokenizer, ChatTemplate(kit.PLAIN), Truncation(16, 15))
    assert encoder.fault(row, encoder(row)) is None, "only pairs must differ"


def test_truncation_limits(kit):
    with pytest.raises(ValueError, match="max_prompt_length must lie in"):
        Truncation(10, 10)
    encoder = RowEncoder(kit.byte_level(), ChatTemplate(kit.PLAIN), Truncation(20, 3))
    with pytest.raises(TemplateError, match="that always stay"):
        encoder(Row.single("0123456789" * 20, "x"))


def test_the_microworld_in_its_own_tokens():
    tokenizer = build_tokenizer()
    encoder = RowEncoder(tokenizer, ChatTemplate(), Truncation())
    for raw in safety_rows(20):
        tree = encoder(Row.pair(raw["prompt"], raw["response_0"], raw["response_1"]))
        assert tokenizer.decode(tree.prompt_ids) == f"<bos> {raw['prompt']} <sep>"
        assert tokenizer.decode(tree.response_ids[1]) == f"{raw['response_1']} <eos>"
        assert tokenizer.unk_token_id not in tree.prompt_ids
