"""Where networks come from: the Hub or a folder in its format, or a config (the embedded tiny model)."""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    find_adapter_config_file,
)
from transformers.utils.hub import get_checkpoint_shard_files

from bfpo_pl.component import Component, UserError, causes_of, check_range
from bfpo_pl.models.outline import Outline, WholeOnly
from bfpo_pl.models.quantization import FourBit
from bfpo_pl.models.trainable import LoRA, TrainablePart
from bfpo_pl.models.weights import files_digest, network_digest


class ModelSourceError(UserError):
    """A model that cannot be had, with what to do about it."""


class ModelSource(Component, ABC):
    """Makes a causal language model and its tokenizer. Cheap to construct: weights load when the trainer asks."""

    def check(self) -> None:
        """Fails early, before any weight loads, if the model cannot be had.

        Raises:
            ModelSourceError: It cannot; the message says why and what to do.
        """

    def check_training(self, trainable: TrainablePart, precision: str) -> None:
        """Fails early if the model cannot be trained so.

        Args:
            trainable: What of it trains.
            precision: The trainer's precision.

        Raises:
            UserError: It cannot.
        """

    def unquantised(self) -> ModelSource:
        """Where the same model comes from with its weights as they were stored: what an adapter is merged into."""
        return self

    @abstractmethod
    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""

    def stop_token_ids(self) -> list[int]:
        """Tokens that end the model's responses, as its generation config names them; none if it has no such config.

        Raises:
            ModelSourceError: The generation config cannot be read.
        """
        return []

    @abstractmethod
    def load_model(self) -> PreTrainedModel:
        """A new copy of the model with its weights, on the CPU. Every call gives the same weights."""

    def skeleton(self) -> PreTrainedModel:
        """The model with its config and generation config, for those who bring other weights; its own may be missing.

        Raises:
            ModelSourceError: The model cannot be had.
        """
        return self.load_model()

    @property
    def origin(self) -> tuple[str, str | None] | None:
        """Hub id or folder from which transformers loads this very model, and the revision; None if there is none."""
        return None

    def outline(self) -> Outline:
        """The same model without its weights, and the files that hold them, for loading in shards.

        Raises:
            WholeOnly: It can only be loaded whole; the message says why.
            ModelSourceError: The model cannot be had.
        """
        raise WholeOnly(f"{type(self).__name__} makes its weights itself")

    def weights_digest(self, memory: Path) -> str:
        """A text that changes whenever the network that `load_model` gives does. By default it loads the network.

        Args:
            memory: Folder in which digests of files are remembered.

        Raises:
            ModelSourceError: The model cannot be had.
        """
        return network_digest(self.load_model())


class HFModel(ModelSource):
    """A causal language model from the Hugging Face Hub or from a local folder in its format.

    Args:
        path: Hub id such as ``Qwen/Qwen3-0.6B``, or a folder with config.json, *.safetensors and the tokenizer
            (every run leaves one in its ``export`` folder).
        revision: Branch, tag or commit on the Hub.
        dtype: Type of the parameters. Keep float32 for training, with ``trainer.precision: bf16-mixed`` on a GPU.
        attn_implementation: Attention of transformers (sdpa, eager, flash_attention_2); its own choice by default.
        disable_dropout: Sets every dropout probability to 0, in policy and reference, as DPO implementations do.
        tokenizer: Hub id or folder of another tokenizer. Default: the model's own.
        trust_remote_code: Lets the repository run its own Python code on this machine. Off: nothing foreign runs.
        quantization: Keeps the base weights in fewer bits, for `LoRA`. Default: no.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32",
        attn_implementation: str | None = None,
        disable_dropout: bool = True,
        tokenizer: str | None = None,
        trust_remote_code: bool = False,
        quantization: FourBit | None = None,
    ) -> None:
        self.path = path
        self.revision = revision
        self.dtype = dtype
        self.attn_implementation = attn_implementation
        self.disable_dropout = disable_dropout
        self.tokenizer = tokenizer
        self.trust_remote_code = trust_remote_code
        self.quantization = quantization

    def check(self) -> None:
        if self.quantization is not None:
            self.quantization.check()
        self._load_config()

    def check_training(self, trainable: TrainablePart, precision: str) -> None:
        if self.quantization is None:
            return
        if not isinstance(trainable, LoRA):
            raise UserError(
                f"HFModel: {type(trainable).__name__} cannot train weights in four bits. Set model.trainable to LoRA "
                f"(`-c configs/model/lora_4bit.yaml`), or leave out model.policy.quantization."
            )
        self.quantization.check_precision(precision)

    def unquantised(self) -> ModelSource:
        if self.quantization is None:
            return self
        plain = copy.copy(self)
        plain.quantization = None
        return plain

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        path = _expanded(self.tokenizer or self.path)
        revision = None if self.tokenizer else self.revision
        with _explained(path):
            return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=self.trust_remote_code)

    def stop_token_ids(self) -> list[int]:
        config = self._generation_config()
        given: Any = None if config is None else config.eos_token_id
        return [] if given is None else [given] if isinstance(given, int) else list(given)

    def _generation_config(self) -> GenerationConfig | None:
        """The model's generation config, if it has one."""
        path = _expanded(self.path)
        if Path(path).is_dir() and not (Path(path) / GENERATION_CONFIG_NAME).is_file():
            return None
        with _explained(self.path):
            try:
                return GenerationConfig.from_pretrained(path, revision=self.revision or "main")
            except OSError as error:
                # The repository has no such file; or its copy in the cache has none, and nobody else is to be asked.
                absent = EntryNotFoundError if constants.HF_HUB_OFFLINE else RemoteEntryNotFoundError
                if any(isinstance(cause, absent) for cause in causes_of(error)):
                    return None
                raise

    def load_model(self) -> PreTrainedModel:
        more = {} if self.quantization is None else {"quantization_config": self.quantization.config()}
        return self._pretrained(self._load_config(), **more)

    def outline(self) -> Outline:
        if self.trust_remote_code:
            raise WholeOnly("trust_remote_code is set, and a repository's own code may load weights in its own way")
        config = None if self.quantization else self._load_config()
        if config is None or getattr(config, "quantization_config", None) is not None:
            raise WholeOnly("its weights are quantised")
        # Everything but the weights is as from_pretrained makes it; of the weights it looks up names and sizes.
        network = self._pretrained(config, device_map={"": "meta"})
        with _explained(self.path):
            return Outline.of(network, self._weight_files())

    def _pretrained(self, config: Any, **more: Any) -> PreTrainedModel:
        if self.disable_dropout:
            _zero_dropout_settings(config)
        with _explained(self.path):
            model = AutoModelForCausalLM.from_pretrained(
                _expanded(self.path),
                config=config,
                revision=self.revision,
                dtype=self.dtype,
                attn_implementation=self.attn_implementation,
                trust_remote_code=self.trust_remote_code,
                use_safetensors=True,
                **more,
            )
        if self.disable_dropout:
            _zero_dropout_modules(model)
        return model

    def skeleton(self) -> PreTrainedModel:
        config = self._load_config()
        if self.disable_dropout:
            _zero_dropout_settings(config)
        with _explained(self.path), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=self.trust_remote_code)
        own = self._generation_config()
        if own is not None:
            model.generation_config = own
        return model

    @property
    def origin(self) -> tuple[str, str | None] | None:
        path = _expanded(self.path)
        return (str(Path(path).absolute()) if Path(path).is_dir() else path), self.revision

    def weights_digest(self, memory: Path) -> str:
        with _explained(self.path):
            config = cached_file(_expanded(self.path), CONFIG_NAME, revision=self.revision)
            files = [Path(str(config)), *self._weight_files()]
        kind = self.dtype if self.quantization is None else f"{self.dtype} {self.quantization}"
        return f"{kind} {files_digest(files, memory)}"

    def _weight_files(self) -> list[Path]:
        """The files that `from_pretrained` reads, in the Hub's cache or a folder."""
        path = _expanded(self.path)
        optional = {"revision": self.revision, "_raise_exceptions_for_missing_entries": False}
        files = [cached_file(path, SAFE_WEIGHTS_NAME, **optional)]  # as from_pretrained: this one before several
        if files == [None]:
            index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, revision=self.revision)
            files, _ = get_checkpoint_shard_files(path, index, revision=self.revision)
        return [Path(str(file)) for file in files]

    def _load_config(self) -> Any:
        path = Path(_expanded(self.path))
        looks_local = path.is_absolute() or self.path.startswith((".", "~")) or self.path.count("/") > 1
        if looks_local and not path.is_dir():
            raise ModelSourceError(
                f"HFModel: there is no folder '{self.path}'. Set policy.path to a Hub id or to a folder with "
                f"config.json and *.safetensors (a run's export/ folder is one)."
            )
        if find_adapter_config_file(str(path), revision=self.revision):
            # Else transformers would put it on, for policy and reference alike, whatever model.trainable says.
            raise ModelSourceError(
                f"HFModel: '{self.path}' has an adapter ({ADAPTER_CONFIG_NAME}); a policy starts from whole weights. "
                "Merge it, `peft.PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(merged)`, "
                "and name the merged folder; or move the adapter's files away to start from the weights without it."
            )
        if path.is_dir() and not (path / "config.json").is_file():
            raise ModelSourceError(
                f"HFModel: the folder '{self.path}' has no config.json; is it a run? Use its export/."
            )
        if path.is_dir() and not list(path.glob("*.safetensors")):
            raise ModelSourceError(
                f"HFModel: the folder '{self.path}' has no *.safetensors. Other weight formats can run code when they "
                f"load and are refused; convert them with save_pretrained first."
            )
        with _explained(self.path):
            return AutoConfig.from_pretrained(
                str(path), revision=self.revision, trust_remote_code=self.trust_remote_code
            )


class TinyModel(ModelSource):
    """The embedded model: a small Llama with random weights and the microworld's tokenizer. No download.

    Args:
        hidden_size: Width of the residual stream.
        layers: Number of transformer blocks.
        heads: Attention heads; must divide ``hidden_size``.
        intermediate_size: Width of the MLPs.
        initializer_range: Standard deviation of the initial weights. At this size 1/sqrt(hidden_size) learns; the
            usual 0.02 does not.
        seed: Seed of the weights. Default: the run's ``seed_everything``, so that every process builds the same.
    """

    def __init__(
        self,
        hidden_size: int = 128,
        layers: int = 3,
        heads: int = 4,
        intermediate_size: int = 384,
        initializer_range: float = 0.09,
        seed: int | None = None,
    ) -> None:
        if hidden_size % heads:
            raise UserError(f"TinyModel: heads ({heads}) must divide hidden_size ({hidden_size}).")
        self.hidden_size = hidden_size
        self.layers = int(check_range(self, "layers", layers, 1))
        self.heads = heads
        self.intermediate_size = intermediate_size
        self.initializer_range = initializer_range
        self.seed = seed

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        from bfpo_pl.microworld import build_tokenizer

        return build_tokenizer()

    def load_model(self) -> PreTrainedModel:
        config = self._config()
        seed = self.seed if self.seed is not None else int(os.environ.get("PL_GLOBAL_SEED", "0"))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs' generators as well
            return LlamaForCausalLM(config)

    def skeleton(self) -> PreTrainedModel:
        with torch.device("meta"):
            return LlamaForCausalLM(self._config())

    def _config(self) -> LlamaConfig:
        tokenizer = self.load_tokenizer()
        return LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            intermediate_size=self.intermediate_size,
            initializer_range=self.initializer_range,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )


_LOADING_ERRORS = (OSError, ValueError, ImportError, SafetensorError)


def _expanded(path: str) -> str:
    """The path with a leading ``~`` spelt out; a Hub id as it is."""
    return str(Path(path).expanduser()) if path.startswith("~") else path


class _explained:
    """Turns the errors of Hub and loader into one sentence with a remedy."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ModelSourceError) or not isinstance(error, _LOADING_ERRORS):
            return
        causes = causes_of(error)
        text = " ".join(str(error).split())
        if any(isinstance(item, GatedRepoError) for item in causes) or "gated repo" in text:
            remedy = (
                f"'{self.path}' is a gated repository: accept its terms on its Hub page, then log in with "
                f"`hf auth login` or set HF_TOKEN."
            )
        elif any(isinstance(item, RepositoryNotFoundError) for item in causes) or "is not a valid model" in text:
            remedy = f"There is no repository or folder '{self.path}' (a private one needs HF_TOKEN)."
        elif "trust_remote_code" in text:
            remedy = (
                f"'{self.path}' ships its own Python code, which is not run unless you set trust_remote_code: true; "
                f"do so only if you trust its authors."
            )
        else:
            sought = "" if Path(self.path).is_dir() else " (there is no folder of that name, so the Hub was asked)"
            remedy = f"'{self.path}' could not be loaded{sought}: {text[:300]}"
        raise ModelSourceError(f"HFModel: {remedy}") from error


def _zero_dropout_settings(config: Any) -> None:
    """Sets every dropout probability of a config to 0, those that functional attention reads among them."""
    for name, value in list(vars(config).items()):
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
        elif isinstance(value, PretrainedConfig):  # the text part of a multimodal model
            _zero_dropout_settings(value)


def _zero_dropout_modules(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
