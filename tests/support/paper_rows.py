"""Rows in the schemas of the paper's datasets."""

import itertools

from bfpo_pl.microworld.rows import sft_rows

LONG = "x" * 1500


def pku_rows(count):
    """PKU-SafeRLHF's schema: every quadrant in turn, the better response first and second; the first rows are long."""
    rows = []
    for i in range(count):
        chosen, rejected = (f"Yes, {i}, of course: {'do it. ' * (i % 5)}", f"No, not {i}.")
        prompt = f"Question {i}?"
        if i == 0:
            prompt, rejected = LONG + prompt, LONG + rejected  # both are cut
        elif i == 1:
            chosen = LONG + chosen  # the prompt is short and stays, the response is cut
        elif i == 2:
            prompt = LONG + prompt  # with its last 512 tokens the row fits
        better = (i // 4) % 2
        safe = [(True, True), (True, False), (False, False), (False, True)][i % 4]  # chosen, rejected
        texts = {better: (chosen, safe[0]), 1 - better: (rejected, safe[1])}
        rows.append(
            {
                "prompt": prompt,
                **{f"response_{side}": texts[side][0] for side in (0, 1)},
                **{f"is_response_{side}_safe": texts[side][1] for side in (0, 1)},
                "better_response_id": better,
                "safer_response_id": better if safe != (False, True) else 1 - better,
            }
        )
    return rows


def ultrafeedback_rows(count):
    """UltraFeedback-binarized's schema."""
    rows = []
    for i in range(count):
        asked = [{"role": "user", "content": f"Tell me about {i}."}]
        answers = [[*asked, {"role": "assistant", "content": text}] for text in (f"{i} is even or odd.", f"{i}?")]
        rows.append({"prompt": asked[0]["content"], "chosen": answers[0], "rejected": answers[1]})
    return rows


def ultrachat_rows(count):
    """UltraChat's schema: conversations of several turns."""
    turns = [row["messages"] for row in sft_rows(10 * count)]
    joined = [list(itertools.chain(*turns[10 * i : 10 * i + 10])) for i in range(count)]
    return [{"prompt": each[0]["content"], "messages": each} for each in joined]


def red_team_rows(rows):
    """Rows of PKU-SafeRLHF's schema in that of the paper's red-team file."""
    return [
        {
            "prompt": row["prompt"],
            "modeloutput1": row["response_0"],
            "modeloutput2": row["response_1"],
            "better_modelout": row["better_response_id"] + 1,
            "is_modelout1_safe": row["is_response_0_safe"],
            "is_modelout2_safe": row["is_response_1_safe"],
        }
        for row in rows
    ]
