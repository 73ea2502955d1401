"""The tokenizer: round trips and the chat template."""

import pytest
from transformers import AutoTokenizer

from bfpo_pl.microworld import build_tokenizer, sft_rows


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_round_trip(tokenizer):
    for row in sft_rows(200):
        for message in row["messages"]:
            ids = tokenizer.encode(message["content"], add_special_tokens=False)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == message["content"]


def test_template_and_prefix(tokenizer):
    for row in sft_rows(50):
        user, assistant = row["messages"]
        whole = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        assert prompt == f"<bos> {user['content']} <sep>"
        assert whole == f"{prompt} {assistant['content']} <eos>"
        whole_ids = tokenizer.encode(whole, add_special_tokens=False)
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
        assert whole_ids[: len(prompt_ids)] == prompt_ids
        assert tokenizer.decode(whole_ids[len(prompt_ids) :], skip_special_tokens=True) == assistant["content"]


def test_special_tokens(tokenizer):
    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id]
    assert ids == [0, 1, 2, 3]
    assert tokenizer.encode("open the zeppelin", add_special_tokens=False)[-1] == tokenizer.unk_token_id == 4
    with pytest.raises(Exception, match="user and assistant"):
        tokenizer.apply_chat_template([{"role": "system", "content": "help ."}], tokenize=False)


def test_saves_and_loads(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    messages = sft_rows(1)[0]["messages"]
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.apply_chat_template(messages, tokenize=False) == tokenizer.apply_chat_template(
        messages, tokenize=False
    )
