"""Models from folders in the Hub's format and from a config, and the errors on the way."""

import json
import shutil

import httpx
import peft
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bfpo_pl.component import UserError
from bfpo_pl.data.collate import collate
from bfpo_pl.data.trees import PairTree
from bfpo_pl.models.attention import Padded
from bfpo_pl.models.log_probs import response_log_probs
from bfpo_pl.models.sources import HFModel, ModelSourceError, TinyModel

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, attention_dropout=0.25)),
    "qwen2-tied": (Qwen2ForCausalLM, Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=False)),
}


def tokenizer_without_pad():
    words = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "open", "the", "window"])}
    core = Tokenizer(WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{{ messages[0].content }}"
    return tokenizer


def saved(name, folder):
    """Writes a tiny model in several files, and returns it."""
    kind, config = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = kind(config).eval()
    model.save_pretrained(folder, max_shard_size="12KB")
    tokenizer_without_pad().save_pretrained(folder)
    return model


@pytest.mark.parametrize("beside", [True, False], ids=["beside weights", "alone"])
def test_a_folder_with_an_adapter_is_refused_before_weights_load(tmp_path, beside):
    """The digest of kept log-probs would not tell one adapter from another, and a reference might lose it."""
    model = saved("llama", tmp_path)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    folder = tmp_path if beside else tmp_path / "adapter"
    model.save_pretrained(folder)
    with pytest.raises(ModelSourceError, match=r"has an adapter .*merge_and_unload"):
        HFModel(str(folder)).check()


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_with_several_files(tmp_path, name):
    model = saved(name, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert (tmp_path / "model.safetensors.index.json").is_file()
    source = HFModel(str(tmp_path))
    source.check()
    first, second = source.load_model(), source.load_model()
    assert type(first) is type(model)
    want = model.state_dict()
    for loaded in (first, second):
        got = loaded.state_dict()
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want)
    assert first.lm_head.weight.data_ptr() != second.lm_head.weight.data_ptr()
    tied = first.lm_head.weight.data_ptr() == first.model.embed_tokens.weight.data_ptr()
    assert tied == (name == "qwen2-tied")
    batch = collate([(0, PairTree([1, 7], [[5, 2], [9, 9, 2]], ((0, 1),)))], ["only"], [1.0])
    with torch.no_grad():
        assert torch.equal(response_log_probs(first, batch, Padded()), response_log_probs(model, batch, Padded()))


def test_a_tokenizer_without_a_pad_token(tmp_path):
    saved("llama", tmp_path)
    tokenizer = HFModel(str(tmp_path)).load_tokenizer()
    assert tokenizer.pad_token_id is None
    assert tokenizer("open the window")["input_ids"] == [3, 4, 5]
    assert tokenizer.chat_template == "{{ messages[0].content }}"


def test_another_tokenizer(tmp_path):
    saved("llama", tmp_path / "model")
    other = tokenizer_without_pad()
    other.chat_template = "other"
    other.save_pretrained(tmp_path / "other")
    assert HFModel(str(tmp_path / "model"), tokenizer=str(tmp_path / "other")).load_tokenizer().chat_template == "other"


def test_dtype(tmp_path):
    saved("llama", tmp_path)
    assert HFModel(str(tmp_path)).load_model().dtype == torch.float32
    assert HFModel(str(tmp_path), dtype="bfloat16").load_model().dtype == torch.bfloat16


def dropouts(model):
    return [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]


def test_dropout_is_disabled_in_config_and_modules(tmp_path):
    config = GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=16, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    on = HFModel(str(tmp_path), disable_dropout=False).load_model()
    assert on.config.attn_pdrop == on.config.resid_pdrop == on.config.embd_pdrop == 0.1
    assert dropouts(on)
    assert set(dropouts(on)) == {0.1}
    off = HFModel(str(tmp_path)).load_model()
    assert off.config.attn_pdrop == off.config.resid_pdrop == off.config.embd_pdrop == 0.0
    assert set(dropouts(off)) == {0.0}
    tokens = torch.arange(1, 12)[None]
    off.train(), on.train()
    assert torch.equal(off(tokens).logits, off(tokens).logits)
    assert not torch.equal(on(tokens).logits, on(tokens).logits)


def test_functional_attention_dropout_is_disabled(tmp_path):
    saved("llama", tmp_path)
    off, on = HFModel(str(tmp_path)).load_model(), HFModel(str(tmp_path), disable_dropout=False).load_model()
    assert (off.config.attention_dropout, on.config.attention_dropout) == (0.0, 0.25)
    tokens = torch.arange(1, 12)[None]
    off.train(), on.train()
    assert torch.equal(off(tokens).logits, off(tokens).logits)
    assert not torch.equal(on(tokens).logits, on(tokens).logits)


def test_dropout_of_the_text_part_of_a_multimodal_model_is_disabled(tmp_path):
    text = {**SIZES, "head_dim": 8, "attention_dropout": 0.25}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, tie_word_embeddings=False)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    model = HFModel(str(tmp_path)).load_model().train()
    assert model.config.text_config.attention_dropout == 0.0
    tokens = torch.arange(1, 12)[None]
    states = [model.base_model(input_ids=tokens).last_hidden_state for _ in range(2)]
    assert torch.equal(*states)


# ---- stop tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "ids"), [(7, [7]), ([2, 7, 9], [2, 7, 9]), (None, [])])
def test_stop_tokens_of_a_generation_config(tmp_path, given, ids):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": given, "temperature": 0.6}))
    assert HFModel(str(tmp_path)).stop_token_ids() == ids  # no weights are asked for


def test_no_generation_config_names_no_stop_tokens(tmp_path):
    assert HFModel(str(tmp_path)).stop_token_ids() == []
    assert tiny().stop_token_ids() == []


def test_a_generation_config_that_is_not_json(tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelSourceError, match="could not be loaded"):
        HFModel(str(tmp_path)).stop_token_ids()


def test_stop_tokens_of_a_cached_repository_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--somebody--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    source = HFModel("somebody/model")
    assert source.stop_token_ids() == []
    (snapshot / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert source.stop_token_ids() == [3, 4]


@pytest.mark.parametrize("kind", [RemoteEntryNotFoundError, LocalEntryNotFoundError])
def test_only_a_file_that_is_known_to_be_absent_names_no_stop_tokens(monkeypatch, kind):
    """Online, an answer that the file is not there counts; an answer that never came does not."""

    def refuse(*args, **kwargs):
        missing = hub_error(kind, 404) if kind is RemoteEntryNotFoundError else kind("No connection.")
        raise OSError("You cannot have it.") from missing

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(GenerationConfig, "from_pretrained", refuse)
    source = HFModel("somebody/model")
    if kind is RemoteEntryNotFoundError:
        assert source.stop_token_ids() == []
    else:
        with pytest.raises(ModelSourceError, match="could not be loaded"):
            source.stop_token_ids()


# ---- errors -----------------------------------------------------------------------------------------------------


def refused(source):
    """The one-line message with which a source is refused, by ``check`` and by ``load_model`` alike."""
    messages = []
    for ask in (source.check, source.load_model):
        with pytest.raises(ModelSourceError) as caught:
            ask()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert isinstance(caught.value, UserError)
    assert "Traceback" not in messages[0]
    assert "\n" not in messages[0]
    assert messages[0].startswith("HFModel: ")
    return messages[0]


@pytest.mark.parametrize("path", ["./nowhere", "/no/such/folder", "runs/sft/x/export", "~/no-such-folder"])
def test_a_missing_folder(path):
    message = refused(HFModel(path))
    assert f"there is no folder '{path}'" in message
    assert "export/" in message


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved("llama", tmp_path / "model")
    source = HFModel("~/model")
    source.check()
    assert source.load_model().config.vocab_size == 40
    assert source.load_tokenizer().eos_token == "</s>"


def test_a_folder_that_is_no_model(tmp_path):
    assert "has no config.json; is it a run? Use its export/." in refused(HFModel(str(tmp_path)))


def test_pickled_weights_are_refused(tmp_path):
    model = saved("llama", tmp_path)
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    message = refused(HFModel(str(tmp_path)))
    assert "no *.safetensors" in message
    assert "can run code" in message


def test_a_missing_shard(tmp_path):
    saved("llama", tmp_path)
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(ModelSourceError, match="could not be loaded"):
        HFModel(str(tmp_path)).load_model()


def test_a_truncated_shard(tmp_path):
    saved("llama", tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-64])
    with pytest.raises(ModelSourceError, match="could not be loaded"):
        HFModel(str(tmp_path)).load_model()


def test_a_config_that_is_not_json(tmp_path):
    saved("llama", tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "could not be loaded" in refused(HFModel(str(tmp_path)))


def test_a_hub_id_that_is_not_cached_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    message = refused(HFModel("nobody/nothing-here"))
    assert "'nobody/nothing-here'" in message


def hub_error(kind, status):
    request = httpx.Request("GET", "https://huggingface.co/somebody/model/resolve/main/config.json")
    return kind(f"{status} Client Error.", response=httpx.Response(status, request=request))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("kind", "status", "words"),
    [
        (GatedRepoError, 403, ("'somebody/model' is a gated repository", "HF_TOKEN", "accept its terms")),
        (RepositoryNotFoundError, 404, ("There is no repository or folder 'somebody/model'", "HF_TOKEN")),
    ],
)
def test_a_repository_that_the_hub_refuses(monkeypatch, wrapped, kind, status, words):
    def refuse(*args, **kwargs):
        if not wrapped:
            raise hub_error(kind, status)
        try:
            raise hub_error(kind, status)
        except kind as error:
            raise OSError("You cannot have it.\nSee the page.") from error

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    message = refused(HFModel("somebody/model"))
    for word in words:
        assert word in message


def test_foreign_code_is_not_run_unasked(tmp_path):
    saved("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_type"] = "foreign"
    config["auto_map"] = {
        "AutoConfig": "configuration_foreign.ForeignConfig",
        "AutoModelForCausalLM": "modeling_foreign.ForeignModel",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "configuration_foreign.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    message = refused(HFModel(str(tmp_path)))
    assert "ships its own Python code" in message
    assert "trust_remote_code: true" in message
    assert not (tmp_path / "ran").exists()


def test_an_unknown_architecture(tmp_path):
    saved("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "not-a-model"}))
    assert "not-a-model" in refused(HFModel(str(tmp_path)))


def test_a_folder_without_a_tokenizer(tmp_path):
    saved("llama", tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    for file in tmp_path.glob("special_tokens*"):
        file.unlink()
    shutil.rmtree(tmp_path / "additional_chat_templates", ignore_errors=True)
    with pytest.raises(ModelSourceError, match=str(tmp_path)):
        HFModel(str(tmp_path)).load_tokenizer()


# ---- the embedded model -----------------------------------------------------------------------------------------


def tiny(**arguments):
    return TinyModel(hidden_size=32, layers=2, heads=4, intermediate_size=48, **arguments)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_tiny_weights_depend_on_the_seed_alone():
    first = tiny(seed=1).load_model()
    torch.manual_seed(99)
    torch.rand(7)
    assert same(first, tiny(seed=1).load_model())
    assert not same(first, tiny(seed=2).load_model())


def test_tiny_takes_the_runs_seed(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    assert same(tiny().load_model(), tiny(seed=5).load_model())
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert same(tiny().load_model(), tiny(seed=0).load_model())


def test_tiny_leaves_the_global_generators_alone(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)  # this machine may have no GPU to look at
    before = torch.get_rng_state()
    tiny(seed=1).load_model()
    assert torch.equal(torch.get_rng_state(), before)
    assert seeded == []


def test_tiny_fits_its_tokenizer():
    source = tiny(seed=1)
    model, tokenizer = source.load_model(), source.load_tokenizer()
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tiny_heads_must_divide_the_width():
    with pytest.raises(UserError, match=r"TinyModel: heads \(5\) must divide hidden_size \(32\)"):
        TinyModel(hidden_size=32, heads=5)
