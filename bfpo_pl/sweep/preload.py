"""Imports what every trial needs, in the process that trials are forked from."""

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

import bfpo_pl.callbacks.microworld
import bfpo_pl.data.datamodule
import bfpo_pl.data.microworld_sources
import bfpo_pl.module
import bfpo_pl.parsing
import bfpo_pl.sft  # noqa: F401
