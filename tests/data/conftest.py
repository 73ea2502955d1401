import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ '[' + m.role + '] ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
SPECIALS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
)
TEXTS = [
    "Open the window, please. How do I open a window in the morning?",
    "I am sorry, but I can not help with that.\n\nInstead, here is another idea:\n1. Walk.\n2. Wait.",
    "Grüße aus Köln: naïve café, 你好, مرحبا, 👍",
]


def byte_level(
    bos: str | None = "<s>", eos: str = "</s>", texts: Sequence[str] = TEXTS, vocabulary: int = 400
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained here, as those of GPT-2, Llama 3 and Qwen are."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = sorted({token for token in (bos, eos, *SPECIALS) if token})
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([*texts] * 4, trainer)
    if bos is not None:
        core.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A BPE tokenizer with byte fallback that puts a space before any text, as those of Llama 2 and Mistral do."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    core.train_from_iterator([*TEXTS, "<|user|> <|assistant|> <|system|>"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    """A unigram tokenizer with a space before any text, as those of T5 are; unlike theirs it keeps all white space."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    core.train_from_iterator(TEXTS * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def sentencepiece(folder: Path, slow: bool = False) -> PreTrainedTokenizerBase:
    """A real sentencepiece model, trained here; converted, as Llama 2's is loaded now, or run by sentencepiece itself.

    Args:
        folder: Where the model is written.
        slow: Whether sentencepiece itself runs.
    """
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS, "<|user|> <|assistant|> <|system|>"] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=460,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    if not slow:
        return LlamaTokenizer.from_pretrained(folder)
    return SentencePieceBackend(vocab_file=str(path), bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """Chat templates, sample texts and builders of tokenizers."""
    return SimpleNamespace(
        CHATML=CHATML,
        PLAIN=PLAIN,
        ZEPHYR=ZEPHYR,
        LLAMA3=LLAMA3,
        GEMMA=GEMMA,
        MISTRAL=MISTRAL,
        TEXTS=TEXTS,
        byte_level=byte_level,
        sentencepiece_like=sentencepiece_like,
        unigram=unigram,
        sentencepiece=sentencepiece,
    )


@pytest.fixture
def shared_data() -> Path:
    """The folder of real data files; the test is skipped where it is absent."""
    repository = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("BFPO_SHARED", repository.parent / "shared" / "data"))
    folder = folder / "data" if (folder / "data" / "INDEX.md").is_file() else folder
    if not (folder / "INDEX.md").is_file():
        pytest.skip(f"the real data files are not at {folder} (set BFPO_SHARED)")
    return folder


@pytest.fixture
def write_jsonl(tmp_path):
    """Writes rows to a file of JSON lines and returns its path."""

    def write(rows, name="rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write
