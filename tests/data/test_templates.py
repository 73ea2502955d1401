import inspect
import json
import random

import pytest

from bfpo_pl.component import UserError
from bfpo_pl.data.encoding import RowEncoder
from bfpo_pl.data.rows import Row, RowError
from bfpo_pl.data.templates import ChatTemplate, OfficialTemplate, TemplateError
from bfpo_pl.data.truncation import Truncation
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


def test_text_comes_back(encoder, kit):
    """decode(prompt) and decode(response) together are the rendered text up to the first stop token."""
    tokenizer = encoder.tokenizer
    if tokenizer.unk_token is not None:
        pytest.skip("the sentencepiece-like tokenizer does not keep white space as it is")
    for row in random_rows(" ".join(kit.TEXTS).split(" "), 30, seed=1):
        tree = encoder(row)
        turns = [{"role": "system", "content": "Be good."}]
        turns += [{"role": turn.role, "content": turn.content} for turn in row.prompt]
        prompt = encoder.tokens.render([turns], generation=True)[0]
        for text, ids in zip(row.responses, tree.response_ids, strict=True):
            full = encoder.tokens.render([[*turns, {"role": "assistant", "content": text}]], generation=False)[0]
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


def test_what_a_template_refuses_is_named():
    encoder = RowEncoder(build_tokenizer(), ChatTemplate(system="Be good."), Truncation())
    with pytest.raises(TemplateError, match=r"f:3: the chat template refuses a conversation of system, user: .*system"):
        encoder(Row.single("open the window", "no", "f:3"))


def test_the_microworld_in_its_own_tokens():
    tokenizer = build_tokenizer()
    encoder = RowEncoder(tokenizer, ChatTemplate(), Truncation())
    for raw in safety_rows(20):
        tree = encoder(Row.pair(raw["prompt"], raw["response_0"], raw["response_1"]))
        assert tokenizer.decode(tree.prompt_ids) == f"<bos> {raw['prompt']} <sep>"
        assert tokenizer.decode(tree.response_ids[1]) == f"{raw['response_1']} <eos>"
        assert tokenizer.unk_token_id not in tree.prompt_ids


# ---- templates as real models have them ---------------------------------------------------------------------------

TURNS = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
]
REAL = {
    "qwen": (
        {"bos": None, "eos": "<|im_end|>"},
        "CHATML",
        None,
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>\n<|im_start|>user\nThree?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "Four.<|im_end|>",
    ),
    "llama3": (
        {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>"},
        "LLAMA3",
        "<|eot_id|>",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nOne?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nTwo.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nThree?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "Four.<|eot_id|>",
    ),
    "gemma": (
        {"bos": "<bos>", "eos": "<eos>"},
        "GEMMA",
        "<end_of_turn>",
        "<bos><start_of_turn>user\nOne?<end_of_turn>\n<start_of_turn>model\nTwo.<end_of_turn>\n"
        "<start_of_turn>user\nThree?<end_of_turn>\n<start_of_turn>model\n",
        "Four.<end_of_turn>",
    ),
    "zephyr": (
        {},
        "ZEPHYR",
        None,
        "<s><|user|>\nOne?</s>\n<|assistant|>\nTwo.</s>\n<|user|>\nThree?</s>\n<|assistant|>\n",
        "Four.</s>",
    ),
    "mistral": (
        {},
        "MISTRAL",
        None,
        "<s>[INST] One? [/INST] Two.</s>[INST] Three? [/INST]",
        " Four.</s>",
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_real_templates_by_hand(name, kit):
    """Boundary and end as each family's models are trained; its generation config names the stop that is no EOS."""
    arguments, template, stop, prompt, response = REAL[name]
    tokenizer = kit.byte_level(**arguments)
    stop_ids = [] if stop is None else [tokenizer.convert_tokens_to_ids(stop)]
    encoder = RowEncoder(tokenizer, ChatTemplate(getattr(kit, template)), LONG, stop_ids)
    tree = encoder(Row.single(TURNS, "Four."))
    assert tokenizer.decode(tree.prompt_ids) == prompt
    assert tokenizer.decode(tree.response_ids[0]) == response
    assert tree.prompt_ids == encoder.prompt_ids(Row.single(TURNS, "x").prompt)


@pytest.mark.parametrize("name", REAL)
def test_an_end_of_turn_that_ends_no_response_is_found(name, kit):
    """Where nothing names the family's own end, it is the token that is reported."""
    arguments, template, stop, _, _ = REAL[name]
    tokenizer, chat = kit.byte_level(**arguments), ChatTemplate(getattr(kit, template))
    assert RowEncoder(tokenizer, chat, LONG).unstopped_turn_end() == stop
    if stop is not None:
        named = ChatTemplate(getattr(kit, template), stop_tokens=[stop])
        assert RowEncoder(tokenizer, named, LONG).unstopped_turn_end() is None
        ids = [tokenizer.convert_tokens_to_ids(stop)]
        assert RowEncoder(tokenizer, chat, LONG, ids).unstopped_turn_end() is None
        assert RowEncoder(tokenizer, OfficialTemplate(getattr(kit, template), None), LONG).unstopped_turn_end() is None


def test_no_end_of_turn_is_found_where_there_is_none(kit):
    assert RowEncoder(kit.byte_level(), ChatTemplate(kit.PLAIN), LONG).unstopped_turn_end() is None
    assert RowEncoder(kit.byte_level(), ChatTemplate(kit.GEMMA, system="x"), LONG).unstopped_turn_end() is None


def test_without_the_generation_config_a_response_ends_at_the_tokenizers_token(kit):
    tokenizer = kit.byte_level("<bos>", "<eos>")
    tree = RowEncoder(tokenizer, ChatTemplate(kit.GEMMA), LONG)(Row.single(TURNS, "Four."))
    assert tokenizer.decode(tree.response_ids[0]) == "Four.<end_of_turn>\n<eos>"


def test_gemma_refuses_a_system_message(kit):
    encoder = RowEncoder(kit.byte_level(), ChatTemplate(kit.GEMMA, system="Be good."), LONG)
    with pytest.raises(TemplateError, match=r"f:1: the chat template refuses .* System role not supported"):
        encoder(Row.single("Hi", "x", "f:1"))


def test_a_single_row_that_a_template_refuses_is_a_bad_row(kit):
    system = [{"role": "system", "content": "Be good."}, {"role": "user", "content": "Hi"}]
    rows = [Row.pair("Hi", f"yes</s>{number}", "no", origin=f"f:{number}") for number in range(5)]
    rows[3] = Row.pair(system, "yes", "no", origin="f:3")
    encoder = RowEncoder(kit.byte_level(), ChatTemplate(kit.GEMMA), LONG)
    results = encoder.many(rows)
    assert [isinstance(result, RowError) for result in results] == [False, False, False, True, False]
    assert (results[3].origin, results[3].field, results[3].value) == ("f:3", "roles", "'system, user'")
    assert results[3].reason == "the chat template refuses the conversation: System role not supported"
    assert "data.template.system, kwargs or chat_template" in results[3].remedy
    assert +encoder.counts == {"stop_token_in_text": 4}
    assert str(encoder.many([rows[3]])[0]) == str(results[3])
    demanding = "{% if messages[0].role != 'system' %}{{ raise_exception('Who are you?') }}{% endif %}" + kit.PLAIN
    refused, fine = RowEncoder(kit.byte_level(), ChatTemplate(demanding), LONG).many([rows[0], rows[3]])
    assert refused.reason.endswith("refuses the conversation: Who are you?")
    assert not isinstance(fine, RowError)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('Never.') }}", r"f:1: the chat template refuses a conversation of user: Never\.$"),
        ("{% if add_generation_prompt %}p{% else %}{{ raise_exception('no') }}{% endif %}", "f:1: .*refuses"),
        ("{{ absent.name }}", "f:1: .*'absent' is undefined"),
        ("{% for m in messages %}", r"f:1: the chat template cannot be compiled: line 1: .*chat_template"),
        ("{{ messages | no_filter }}", "f:1: the chat template cannot be compiled: line 1: No filter"),
    ],
)
def test_a_template_that_refuses_every_row_stops(template, message, kit):
    encoder = RowEncoder(kit.byte_level(), ChatTemplate(template), LONG)
    with pytest.raises(TemplateError, match=message):
        encoder.many([Row.single("Hi", "x", "f:1"), Row.single("Ho", "x", "f:2")])


@pytest.mark.parametrize("kind", [ChatTemplate, OfficialTemplate])
@pytest.mark.parametrize(
    "name",
    [
        *("messages", "conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"),
        *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
        *("tokenizer_kwargs", "sanitize_control_tokens"),
    ],
)
def test_variables_that_rendering_takes_for_itself_are_refused(kind, name):
    with pytest.raises(UserError, match=rf"data\.template\.kwargs cannot set {name}: .* Leave it out"):
        kind(kwargs={"enable_thinking": False, name: True})


def test_no_argument_of_rendering_is_a_variable(kit):
    """Those that transformers may add are found here; tools and documents are what templates write of."""
    arguments = set(inspect.signature(kit.byte_level().apply_chat_template).parameters) - {"kwargs"}
    for name in arguments - {"tools", "documents"}:
        with pytest.raises(UserError, match=f"cannot set {name}:"):
            ChatTemplate(kwargs={name: None})


def test_a_template_without_a_prompt_or_a_response_is_refused(kit):
    silent = "{% if add_generation_prompt %}[assistant] {% else %}[assistant] {% endif %}"
    with pytest.raises(TemplateError, match="writes nothing for the response"):
        RowEncoder(kit.byte_level(), ChatTemplate(silent), LONG)(Row.single("Hi", "x"))
    last = "{% if messages[-1].role == 'assistant' %}{{ messages[-1].content }}{% endif %}"
    with pytest.raises(TemplateError, match="writes no prompt"):
        RowEncoder(kit.byte_level(bos=None), ChatTemplate(last), LONG)(Row.single("Hi", "x"))


# ---- one beginning-of-sequence token ------------------------------------------------------------------------------


def test_a_beginning_of_sequence_token_in_the_text_makes_a_bad_row(kit):
    encoder = RowEncoder(kit.byte_level(), ChatTemplate(kit.PLAIN), LONG)
    cases = {
        "prompt": Row.pair("old price <s>9", "yes", "no", origin="f:1"),
        "chosen": Row.pair("p", "yes <s>9", "no", origin="f:1"),
        "rejected": Row.pair("p", "yes", "no <s>9", origin="f:1"),
        "response": Row.single("p", "yes <s>9", "f:1"),
    }
    for name, row in cases.items():
        error = encoder.many([row, Row.single("p", "x")])[0]
        assert isinstance(error, RowError)
        assert (error.origin, error.field, error.value) == ("f:1", name, "'<s>9'")
        assert error.reason == "the text holds the tokenizer's beginning-of-sequence token <s>"


def test_a_template_may_begin_every_turn_with_that_token(kit):
    llama2 = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = kit.byte_level()
    tree = RowEncoder(tokenizer, ChatTemplate(llama2), LONG)(Row.single(TURNS, "Four."))
    assert tokenizer.decode(tree.prompt_ids) == "<s>[INST] One? [/INST] Two. </s><s>[INST] Three? [/INST]"
    inside = kit.PLAIN.replace("m.content", "bos_token + m.content")
    with pytest.raises(TemplateError, match="writes the beginning-of-sequence token <s> into a response"):
        RowEncoder(tokenizer, ChatTemplate(inside), LONG)(Row.single("Hi", "x"))


def test_a_doubled_token_at_the_beginning_is_one(kit):
    tokenizer, row = kit.byte_level(), Row.single("Hi", "x")
    doubled = RowEncoder(tokenizer, ChatTemplate("{{ bos_token + bos_token }}" + kit.PLAIN), LONG)
    assert doubled(row) == RowEncoder(tokenizer, ChatTemplate(kit.PLAIN), LONG)(row)


def test_one_token_for_both_ends(kit):
    """GPT-2's beginning-of-sequence token is its end-of-sequence token."""
    tokenizer = kit.byte_level(bos="</s>", eos="</s>")
    tree = RowEncoder(tokenizer, ChatTemplate(kit.ZEPHYR), LONG)(Row.single("Hi", "x"))
    assert tokenizer.decode([*tree.prompt_ids, *tree.response_ids[0]]) == "</s><|user|>\nHi</s>\n<|assistant|>\nx</s>"


# ---- the loss on all tokens -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ChatTemplate, OfficialTemplate])
@pytest.mark.parametrize("bos", ["<s>", None])
def test_the_loss_on_all_tokens(kind, bos, kit):
    tokenizer = kit.byte_level(bos=bos)
    row = Row.single(TURNS, "Four.", "f:1")
    plain = RowEncoder(tokenizer, kind(kit.ZEPHYR), LONG)(row)
    encoder = RowEncoder(tokenizer, kind(kit.ZEPHYR, loss_on="all"), LONG)
    whole = encoder(row)
    assert whole.prompt_ids == plain.prompt_ids[:1]
    assert whole.response_ids == [[*plain.prompt_ids[1:], *plain.response_ids[0]]]
    assert encoder.prompt_ids(row.prompt) == plain.prompt_ids
    size = len(plain.prompt_ids) + 1
    short = RowEncoder(tokenizer, kind(kit.ZEPHYR, loss_on="all"), Truncation(size, 10))
    assert short(row).response_ids == [whole.response_ids[0][: size - 1]]
    assert +short.counts == {"responses_cut": 1}
    with pytest.raises(TemplateError, match=r"f:2: data\.template\.loss_on = all is for rows with one response"):
        encoder.many([row, Row.pair("p", "a", "b", origin="f:2")])


# ---- the official code's tokens -------------------------------------------------------------------------------------


def official(tokenizer, prompt, response):
    """The recorded rule, written down once more: [BOS] + enc(prompt) | enc(prompt + response)[...] + [EOS]."""
    alone = tokenizer.encode(prompt, add_special_tokens=False)
    both = tokenizer.encode(prompt + response, add_special_tokens=False)
    end = len(alone)
    if both[:end] != alone:
        end -= 1
    return [tokenizer.bos_token_id, *both[:end]], [*both[end:], tokenizer.eos_token_id]


@pytest.mark.parametrize("own", [True, False])
def test_official_tokens_agree_with_the_recorded_ones(own, shared_data, kit):
    """With the tokenizer's own template and with the default one."""
    recorded = json.loads((shared_data.parent / "vectors" / "bfpo_vectors.json").read_text())["tokenisation"]
    for tokenizer in (kit.byte_level(), kit.sentencepiece_like()):
        if own:
            tokenizer.chat_template = kit.ZEPHYR
        encoder = RowEncoder(tokenizer, OfficialTemplate(), LONG)
        turns = encoder.template.conversation(Row.single("PROMPT", "RESP").prompt)
        assert encoder.tokens.render([turns], generation=False) == [recorded["prompt"]]
        assert encoder.tokens.render([turns], generation=True) == [recorded["prompt_with_generation_prompt"]]
        tree = encoder(Row.pair("PROMPT", "RESP", "OTHER"))
        for response, ids in zip(("RESP", "OTHER"), tree.response_ids, strict=True):
            text = recorded["response"].replace("RESP", response)
            assert (tree.prompt_ids, ids) == official(tokenizer, recorded["prompt"], text)
        assert tree.prompt_ids == encoder.prompt_ids(Row.single("PROMPT", "RESP").prompt)
    tokenizer = kit.byte_level()
    standard = RowEncoder(tokenizer, ChatTemplate(kit.ZEPHYR, system=""), LONG)(Row.single("PROMPT", "RESP"))
    assert tokenizer.decode(standard.prompt_ids) == "<s>" + recorded["prompt_with_generation_prompt"]
    assert tokenizer.decode([*standard.prompt_ids, *standard.response_ids[0]]) + "\n" == (
        "<s>" + recorded["prompt"] + recorded["response"]
    ), "the standard policy differs by the header's side and by one end alone"


def test_official_tokens_where_the_template_begins_with_that_token(kit):
    """The official code prepends it whatever the prompt begins with."""
    tokenizer, template = kit.byte_level(), "{{ bos_token }}" + kit.ZEPHYR
    encoder = RowEncoder(tokenizer, OfficialTemplate(template, system=None), LONG)
    tree = encoder(Row.single("Hi", "x"))
    want = official(tokenizer, "<s><|user|>\nHi</s>\n", "<|assistant|>\nx</s>\n")
    assert (tree.prompt_ids, tree.response_ids[0]) == want
    assert tokenizer.decode(tree.prompt_ids) == "<s><s><|user|>\nHi</s>\n"
    assert encoder.prompt_ids(Row.single("Hi", "x").prompt) == tree.prompt_ids


def test_official_sequences_by_hand(kit):
    tokenizer = kit.byte_level()
    own = [{"role": "system", "content": "Own."}, {"role": "user", "content": "Hi"}]
    encoder = RowEncoder(tokenizer, OfficialTemplate(), LONG)
    tree = encoder(Row.pair(own, "one</s>two", "x"))
    assert tokenizer.decode(tree.prompt_ids) == "<s><|system|>\nOwn.</s>\n<|user|>\nHi</s>\n"
    texts = [tokenizer.decode(ids) for ids in tree.response_ids]
    assert texts == ["<|assistant|>\none</s>two</s>\n</s>", "<|assistant|>\nx</s>\n</s>"]
    assert +encoder.counts == {"stop_token_in_text": 1}


def test_official_split_where_a_token_lies_across_the_boundary(kit):
    """The letters ab are one token: the prompt "...a" ends one token earlier before "b", and not before "c"."""
    tokenizer = kit.byte_level(texts=["ab ab ab"] * 9, vocabulary=300)
    assert len(tokenizer.encode("ab", add_special_tokens=False)) == 1
    bare = "{% for m in messages %}{{ m.content }}{% endfor %}"
    encoder = RowEncoder(tokenizer, OfficialTemplate(bare, system=None), LONG)
    tree = encoder(Row.pair("xa", "bc", "b!"))
    assert tokenizer.decode(tree.prompt_ids) == "<s>x"
    assert [tokenizer.decode(ids) for ids in tree.response_ids] == ["abc</s>", "ab!</s>"]
    for text, ids in (("bc", tree.response_ids[0]), ("b!", tree.response_ids[1])):
        assert (tree.prompt_ids, ids) == official(tokenizer, "xa", text)
    assert encoder(Row.pair("xa", "c", "d")).prompt_ids == official(tokenizer, "xa", "c")[0]
    error = encoder.many([Row.pair("xa", "c", "b", origin="f:1")])[0]
    assert isinstance(error, RowError)
    assert (error.origin, error.field, error.value) == ("f:1", "rejected", "'b'")
    assert error.reason == "one response merges with the prompt's last token and another does not"
    standard = RowEncoder(tokenizer, ChatTemplate(bare), LONG)(Row.pair("xa", "c", "b"))
    assert tokenizer.decode(standard.prompt_ids) == "<s>xa"
    assert [tokenizer.decode(ids) for ids in standard.response_ids] == ["c</s>", "b</s>"]
