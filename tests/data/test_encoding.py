import importlib.util
import os
import pickle
import re
import subprocess
import sys

import pytest
from jsonargparse import ArgumentParser
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from bfpo_pl.component import UserError
from bfpo_pl.data.encoding import RowEncoder
from bfpo_pl.data.rows import Message, Row, RowError
from bfpo_pl.data.templates import ChatTemplate, OfficialTemplate, TemplateError
from bfpo_pl.data.trees import PairTree
from bfpo_pl.data.truncation import DropLong, OfficialTruncation, Truncation

LONG = Truncation(100_000, 50_000)
TEXTS = ["Open the window", "Grüße  aus Köln:\n naïve 👍🏽", "مرحبا\r\n\t你好", "  'tis 99\n\n", "\nA line", "a"]


def rows_of_many_kinds():
    rows = [Row.pair(text + "?", text + "x", text * 9 + "y", origin=f"f:{i}") for i, text in enumerate(TEXTS)]
    rows += [Row.single([Message("system", "Own."), Message("user", text * 20)], text, "g") for text in TEXTS]
    rows += [Row.single("one", "a</s>b"), Row((Message("user", "three"),), ("a", "b", "c"), ((2, 0),))]
    return [*rows, Row.pair("p", "same</s>a", "same</s>b"), Row.single("p", "no <s>", "h")]


def shown(results):
    """Results that can be compared: errors by their message."""
    return [str(result) if isinstance(result, RowError) else result for result in results]


@pytest.mark.parametrize("truncation", [LONG, Truncation(90, 60), Truncation(90, 60, "start"), DropLong(90)])
@pytest.mark.parametrize("template", [ChatTemplate, OfficialTemplate])
@pytest.mark.parametrize("name", ["byte_level", "sentencepiece_like", "unigram"])
def test_many_rows_together_are_encoded_as_one_by_one(name, template, truncation, kit):
    rows, tokenizer = rows_of_many_kinds(), getattr(kit, name)()
    together, alone = (RowEncoder(tokenizer, template(kit.ZEPHYR), truncation) for _ in range(2))
    results = together.many(rows)
    assert shown(results) == shown(result for row in rows for result in alone.many([row]))
    assert together.counts == alone.counts
    assert together.many([]) == []
    cut = together.counts["prompts_cut"] + together.counts["responses_cut"]
    assert (cut > 0) == (type(truncation) is Truncation and truncation is not LONG)
    for row, result in zip(rows, results, strict=True):
        if isinstance(result, PairTree):
            assert alone(row) == result
        else:
            with pytest.raises(RowError, match=re.escape(result.reason)):
                alone(row)
    if template is ChatTemplate:  # the official one ends nothing at a stop token, and takes any token in a text
        assert isinstance(results[-1], RowError)
        assert isinstance(results[-2], RowError)


@pytest.mark.parametrize("keep", ["end", "start"])
def test_truncation_keeps_the_prompt_common(keep, kit):
    tokenizer = kit.byte_level()
    whole = RowEncoder(tokenizer, ChatTemplate(kit.PLAIN), LONG)
    encoder = RowEncoder(tokenizer, ChatTemplate(kit.PLAIN), Truncation(60, 20, keep))
    row = Row.pair("0123456789" * 20, "short", "long " * 40)
    tree, full = encoder(row), whole(row)
    assert len(tree.prompt_ids) == 20
    tail = tokenizer("\n[assistant] ", add_special_tokens=False)["input_ids"]
    assert tree.prompt_ids[0] == tokenizer.bos_token_id
    assert tree.prompt_ids[-len(tail) :] == tail
    if keep == "end":
        assert tree.prompt_ids[1:] == full.prompt_ids[-19:]
    else:
        assert tree.prompt_ids[: 20 - len(tail)] == full.prompt_ids[: 20 - len(tail)]
    assert tree.response_ids == [full.response_ids[0], full.response_ids[1][:40]]
    assert +encoder.counts == {"prompts_cut": 1, "responses_cut": 1}


TAILS = {
    "CHATML": "<|im_end|>\n<|im_start|>assistant\n",
    "LLAMA3": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "GEMMA": "<end_of_turn>\n<start_of_turn>model\n",
    "MISTRAL": " [/INST]",
    "ZEPHYR": "</s>\n<|assistant|>\n",
    "PLAIN": "\n[assistant] ",
}


@pytest.mark.parametrize("family", TAILS)
@pytest.mark.parametrize("last", ["window?", "the assistant", "[/INST] 0", "1  ", "model\n"])
def test_a_prompt_cut_at_its_end_keeps_what_closes_its_turn(family, last, kit):
    """Whatever the text ends in, and be it what the template itself writes."""
    tokenizer = kit.byte_level()
    encoder = RowEncoder(tokenizer, ChatTemplate(getattr(kit, family)), Truncation(60, 40, "start"))
    whole = RowEncoder(tokenizer, encoder.template, LONG)(Row.single("Open. " * 90 + last, "Yes"))
    cut = encoder(Row.single("Open. " * 90 + last, "Yes")).prompt_ids
    tail = tokenizer.encode(TAILS[family], add_special_tokens=False)
    assert cut == [*whole.prompt_ids[: 40 - len(tail)], *whole.prompt_ids[len(whole.prompt_ids) - len(tail) :]]
    assert tokenizer.decode(cut[-len(tail) :]) == TAILS[family]


def test_the_official_prompt_cut_at_its_end_keeps_the_end_of_its_turn(kit):
    tokenizer = kit.byte_level()
    encoder = RowEncoder(tokenizer, OfficialTemplate(), Truncation(60, 30, "start"))
    cut = encoder(Row.single("Open. " * 90, "Yes"))
    assert len(cut.prompt_ids) == 30
    assert tokenizer.decode(cut.prompt_ids).endswith("Open</s>\n")
    assert tokenizer.decode(cut.response_ids[0]) == "<|assistant|>\nYes</s>\n</s>"


def test_the_header_alone_stays_where_the_end_of_the_turn_merges_with_the_text(kit):
    """A text that ends in x merges with the xx that the template writes after it."""
    tokenizer = kit.byte_level(texts=["xxx"] * 50, vocabulary=300)
    assert len(tokenizer.encode("xxx", add_special_tokens=False)) == 1
    closing = kit.PLAIN.replace("m.content + '\n'", "m.content + 'xx'")
    encoder = RowEncoder(tokenizer, ChatTemplate(closing), Truncation(60, 30, "start"))
    prompt = encoder(Row.single("Open. " * 90 + "x", "Yes")).prompt_ids
    header = tokenizer.encode("[assistant] ", add_special_tokens=False)
    assert prompt[-len(header) :] == header
    assert "xx" not in tokenizer.decode(prompt)


@pytest.mark.parametrize("kind", [ChatTemplate, OfficialTemplate])
def test_a_row_of_which_only_the_prompt_is_left_is_a_bad_row(kind, kit):
    tokenizer, row = kit.byte_level(), Row.single("0123456789" * 20, "Yes", "f:1")
    size = len(RowEncoder(tokenizer, kind(kit.ZEPHYR), LONG)(row).prompt_ids)

    def encoded(max_length):
        encoder = RowEncoder(tokenizer, kind(kit.ZEPHYR, loss_on="all"), Truncation(max_length, 10))
        return encoder.many([row])[0], +encoder.counts

    error, counts = encoded(size)
    assert isinstance(error, RowError)
    assert (error.origin, error.field, error.value) == ("f:1", "tokens of the prompt", str(size))
    assert error.reason == f"no token of the response is left (data.truncation.max_length = {size})"
    assert counts == {}
    tree, counts = encoded(size + 1)
    assert len(tree.response_ids[0]) == size
    assert counts == {"responses_cut": 1}


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
        return encoder.many([Row.pair("p", chosen, rejected, origin="f:1")])[0]

    same = "the same beginning of both, "
    assert isinstance(fault(same + "a", same + "b"), PairTree)
    cut = fault(same + "a", same + "b", Truncation(16, 15))
    assert (cut.origin, cut.field, cut.value) == ("f:1", "rejected", repr(same + "b"))
    assert cut.reason.endswith("identical once truncation cuts them (data.truncation.max_length = 16)")
    assert isinstance(fault("ab", "cd" + same, Truncation(16, 15)), PairTree)
    alike = fault("yes</s>one", "yes</s>another")
    assert alike.reason == "the chosen and the rejected response tokenise alike"
    row = Row((Message("user", "p"),), (same + "a", "x", same + "b"), ((1, 0),))
    encoder = RowEncoder(tokenizer, ChatTemplate(kit.PLAIN), Truncation(16, 15))
    assert isinstance(encoder(row), PairTree), "only pairs must differ"


def test_truncation_limits(kit):
    with pytest.raises(ValueError, match="max_prompt_length must lie in"):
        Truncation(10, 10)
    encoder = RowEncoder(kit.byte_level(), ChatTemplate(kit.PLAIN), Truncation(20, 3))
    with pytest.raises(TemplateError, match="that always stay"):
        encoder(Row.single("0123456789" * 20, "x"))


def test_long_rows_are_left_out(kit):
    tokenizer = kit.byte_level()
    row = Row.pair("prompt", "short", "long " * 10, origin="f:1")
    tree = RowEncoder(tokenizer, ChatTemplate(kit.PLAIN), LONG)(row)
    size = len(tree.prompt_ids) + max(map(len, tree.response_ids))
    assert RowEncoder(tokenizer, ChatTemplate(kit.PLAIN), DropLong(size))(row) == tree
    encoder = RowEncoder(tokenizer, ChatTemplate(kit.PLAIN), DropLong(size - 1))
    error, fine = encoder.many([row, Row.single("p", "x")])
    assert isinstance(fine, PairTree)
    assert (error.origin, error.field, error.value) == ("f:1", "length in tokens", str(size))
    assert error.reason == f"the row is longer than data.truncation.max_length = {size - 1}"
    assert not +encoder.counts


@pytest.mark.parametrize(
    ("prompt", "responses", "want"),
    [
        (7, (4, 2), (range(3, 7), (4, 2))),  # 7 + 4 does not fit; the prompt's last 4 make room
        (20, (6, 5), (range(16, 20), (6, 5))),
        (20, (7, 5), (range(16, 20), (6, 5))),  # 4 + 7 does not fit: each keeps its first 10 - 4
        (20, (9, 8), (range(16, 20), (6, 6))),
        (2, (9, 3), (range(2), (6, 3))),  # 2 + 8 would have fitted
    ],
)
def test_official_truncation_by_hand(prompt, responses, want):
    ids = [list(range(100, 100 + size)) for size in responses]
    policy = OfficialTruncation(10, 4)
    kept, sizes = want
    cut = [[*range(100, 100 + size)] for size in sizes]
    assert not policy.fits(list(range(prompt)), ids)
    assert policy.fit(list(range(prompt)), ids, 1, 2) == (list(kept), cut)


def test_official_truncation_leaves_what_fits():
    policy = OfficialTruncation(10, 4)
    assert policy.fits([0] * 6, [[0] * 4, [0] * 2])
    assert not policy.fits([0] * 6, [[0] * 2, [0] * 5])


def test_official_truncation_is_counted_and_drops_both_ends(kit):
    tokenizer = kit.byte_level()
    row = Row.pair("0123456789" * 9, "short", "long " * 40)
    whole = RowEncoder(tokenizer, OfficialTemplate(), LONG)(row)
    encoder = RowEncoder(tokenizer, OfficialTemplate(), OfficialTruncation(60, 20))
    tree = encoder(row)
    assert tree.prompt_ids == whole.prompt_ids[-20:]
    assert tree.response_ids == [whole.response_ids[0][:40], whole.response_ids[1][:40]]
    assert len(whole.response_ids[0]) <= 40
    assert tokenizer.bos_token_id not in tree.prompt_ids
    assert tree.response_ids[1][-1] != tokenizer.eos_token_id
    assert +encoder.counts == {"prompts_cut": 1, "responses_cut": 1}


def test_settings_that_other_calls_left_behind_change_nothing(kit):
    tokenizer, row = kit.byte_level(), Row.pair("Open the window, please.", "I am sorry.", "Yes")
    tokenizer.pad_token = "</s>"
    encoder = RowEncoder(tokenizer, ChatTemplate(kit.ZEPHYR), LONG)
    before, mark = encoder(row), encoder.fingerprint()
    tokenizer(["Open the window", "x"], truncation=True, max_length=3, padding=True)
    assert encoder(row) == before
    tokenizer(["Open the window", "x"], truncation=True, max_length=3, padding=True)
    assert encoder.fingerprint() == mark


def test_a_tokenizer_in_python(kit):
    """ByT5's has one token a byte, and none of the white space after a special token."""
    tokenizer = ByT5Tokenizer()
    encoder = RowEncoder(tokenizer, ChatTemplate(kit.ZEPHYR), LONG)
    row = Row.pair("Hi", "é", "x")
    tree = encoder(row)
    header = [byte + 3 for byte in b"<|assistant|>\n"]
    assert tree.prompt_ids == [*(byte + 3 for byte in b"<|user|>\nHi"), 1, *header]
    assert tree.response_ids == [[0xC3 + 3, 0xA9 + 3, 1], [ord("x") + 3, 1]]
    again = RowEncoder(ByT5Tokenizer(), ChatTemplate(kit.ZEPHYR), LONG)
    assert again.fingerprint() == encoder.fingerprint()
    fewer = RowEncoder(ByT5Tokenizer(extra_ids=3), ChatTemplate(kit.ZEPHYR), LONG)
    assert fewer.fingerprint() != encoder.fingerprint()


def test_an_encoder_can_be_sent_to_another_process(kit, tmp_path):
    rows = rows_of_many_kinds()
    for tokenizer in (kit.byte_level(), kit.sentencepiece(tmp_path), kit.sentencepiece(tmp_path, slow=True)):
        encoder = RowEncoder(tokenizer, ChatTemplate(kit.ZEPHYR, stop_tokens=["</s>"]), Truncation(90, 60), [5])
        want = shown(encoder.many(rows))
        copy = pickle.loads(pickle.dumps(encoder))
        assert copy.fingerprint() == encoder.fingerprint()
        assert shown(copy.many(rows)) == want


# ---- the fingerprint ----------------------------------------------------------------------------------------------


def test_the_fingerprint_is_the_same_in_every_process(kit, tmp_path):
    kit.byte_level().save_pretrained(tmp_path)
    script = (
        "import sys; from pathlib import Path; from transformers import PreTrainedTokenizerFast\n"
        "from bfpo_pl.data.encoding import RowEncoder; from bfpo_pl.data.templates import ChatTemplate\n"
        "template = ChatTemplate('{{ messages[0].content }}', '', {'b': [1], 'a': {'y': 2, 'x': 3}}, ['<|im_end|>'])\n"
        "tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])\n"
        "print(RowEncoder(tokenizer, template, stop_ids=[7, 5, 6]).fingerprint())"
    )
    other = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    template = ChatTemplate("{{ messages[0].content }}", "", {"a": {"x": 3, "y": 2}, "b": [1]}, ["<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert other.stdout.split() == [RowEncoder(tokenizer, template, stop_ids=[6, 5, 7]).fingerprint()]


def test_the_fingerprint_covers_all_that_decides_the_tokens(kit, tmp_path):
    tokenizer = kit.byte_level()
    other_words, other_end, split_specials, more = (
        kit.byte_level(texts=["abc abc"]),
        *(kit.byte_level() for _ in "123"),
    )
    other_end.eos_token = "<|im_end|>"
    split_specials.split_special_tokens = True
    more.add_tokens(["window"])
    encoders = [
        RowEncoder(tokenizer, ChatTemplate(kit.PLAIN)),
        *(RowEncoder(other, ChatTemplate(kit.PLAIN)) for other in (other_words, other_end, split_specials, more)),
        RowEncoder(tokenizer, ChatTemplate(kit.PLAIN + " ")),
        RowEncoder(tokenizer, ChatTemplate(kit.PLAIN, system="")),
        RowEncoder(tokenizer, ChatTemplate(kit.PLAIN, kwargs={"enable_thinking": False})),
        RowEncoder(tokenizer, ChatTemplate(kit.PLAIN, kwargs={"enable_thinking": True})),
        RowEncoder(tokenizer, ChatTemplate(kit.PLAIN, stop_tokens=["<|im_end|>"])),
        RowEncoder(tokenizer, ChatTemplate(kit.PLAIN), stop_ids=[9]),
        RowEncoder(tokenizer, ChatTemplate(kit.PLAIN, loss_on="all")),
        RowEncoder(tokenizer, OfficialTemplate(kit.PLAIN)),
        RowEncoder(tokenizer, OfficialTemplate(kit.PLAIN, system=None)),
        RowEncoder(tokenizer, ChatTemplate(kit.PLAIN), Truncation(1000)),
        RowEncoder(tokenizer, ChatTemplate(kit.PLAIN), Truncation(keep="start")),
        RowEncoder(tokenizer, ChatTemplate(kit.PLAIN), DropLong()),
        RowEncoder(tokenizer, ChatTemplate(kit.PLAIN), OfficialTruncation()),
    ]
    prints = [encoder.fingerprint() for encoder in encoders]
    assert len(set(prints)) == len(encoders)
    assert prints == [encoder.fingerprint() for encoder in encoders]
    path = tmp_path / "chat.jinja"
    path.write_text(kit.PLAIN)
    assert RowEncoder(tokenizer, ChatTemplate(str(path))).fingerprint() == prints[0], "where a template lies is nothing"


def test_the_fingerprint_of_a_template_that_looks_at_the_clock(kit):
    encoder = RowEncoder(kit.byte_level(), ChatTemplate("{{ strftime_now('%H:%M:%S.%f') }}" + kit.PLAIN))
    assert encoder.fingerprint() != encoder.fingerprint()


def test_the_fingerprint_covers_the_code(kit, tmp_path):
    """A policy of one's own: the same name and arguments, other code."""
    path = tmp_path / "own_template.py"
    text = "from bfpo_pl.data.templates import ChatTemplate\n\n\nclass Own(ChatTemplate):\n    shift = {}\n"
    prints = set()
    for shift in "121":
        path.write_text(text.format(shift))
        spec = importlib.util.spec_from_file_location("own_template", path)
        sys.modules["own_template"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        prints.add(RowEncoder(kit.byte_level(), module.Own(kit.PLAIN)).fingerprint())
    del sys.modules["own_template"]
    assert len(prints) == 2


def test_a_policy_without_source_text_has_no_fingerprint(kit):
    names = {"ChatTemplate": ChatTemplate, "__name__": "no_module"}
    exec("class Own(ChatTemplate):\n    def source(self, tokenizer):\n        return super().source(tokenizer)", names)
    encoder = RowEncoder(kit.byte_level(), names["Own"]("{{ messages[0].content }}"))
    with pytest.raises(UserError, match="Own cannot be had; define it in a file"):
        encoder.fingerprint()


# ---- the command line ---------------------------------------------------------------------------------------------


class Data:
    """Takes both policies as the data module does."""

    def __init__(self, template: ChatTemplate | None = None, truncation: Truncation | None = None):
        self.template, self.truncation = template, truncation


@pytest.mark.parametrize(
    ("arguments", "template", "truncation"),
    [
        ([], "None", "None"),
        (["--data.truncation.max_length=600"], "None", "Truncation(max_length=600, max_prompt_length=512, keep='end')"),
        (["--data.truncation=DropLong", "--data.truncation.max_length=5"], "None", "DropLong(max_length=5)"),
        (
            ["--data.template=OfficialTemplate", "--data.truncation=OfficialTruncation"],
            "OfficialTemplate(chat_template=None, system='', kwargs={}, stop_tokens=[], loss_on='response')",
            "OfficialTruncation(max_length=1024, max_prompt_length=512)",
        ),
        (
            ["--data.template.loss_on=all", '--data.template.kwargs={"enable_thinking": false}'],
            "ChatTemplate(chat_template=None, system=None, kwargs={'enable_thinking': False}, stop_tokens=[], "
            "loss_on='all')",
            "None",
        ),
    ],
)
def test_policies_on_the_command_line(arguments, template, truncation):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Data, "data")
    data = parser.instantiate_classes(parser.parse_args(arguments)).data
    assert (repr(data.template), repr(data.truncation)) == (template, truncation)
