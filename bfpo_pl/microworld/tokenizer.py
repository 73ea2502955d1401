"""The tokenizer of the microworld: one token per word, with a chat template."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from bfpo_pl.microworld.world import vocabulary

PAD, BOS, EOS, SEP, UNK = "<pad>", "<bos>", "<eos>", "<sep>", "<unk>"
SPECIAL_TOKENS = (PAD, BOS, EOS, SEP, UNK)

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- ' ' + message.content + ' ' + sep_token }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content + ' ' + eos_token }}
    {%- else %}
        {{- raise_exception('the microworld knows the roles user and assistant, not ' + message.role) }}
    {%- endif %}
{%- endfor %}"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer. No file, no download; ids are stable (specials first, then the words in order).

    A conversation renders to ``<bos> prompt words <sep> response words <eos>``. ``<sep>`` follows every user message,
    so ``add_generation_prompt`` changes nothing and the rendered prompt is a prefix of the rendered conversation.
    Unknown words become ``<unk>``.
    """
    ids = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *vocabulary()))}
    core = Tokenizer(WordLevel(ids, unk_token=UNK))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        sep_token=SEP,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
