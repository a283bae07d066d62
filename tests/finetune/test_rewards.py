"""Built-in rewards: what counts as the right answer."""

from __future__ import annotations

import pytest

from deepseek_exp.config.rules import finetune as rules
from deepseek_exp.finetune.rewards import exact_match, last_number, numeric_match, regex_match


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [("46", "46", 1.0), (" 46\n", "46", 1.0), ("46.", "46", 0.0), ("", "46", 0.0), ("46", 46, 1.0)],
)
def test_exact_match(completion, answer, reward):
    assert exact_match(completion, {"answer": answer}) == reward


@pytest.mark.parametrize(
    ("completion", "answer", "tolerance", "reward"),
    [
        ("12 + 34 = 46", "46", 0.0, 1.0),
        ("46 or 47", "46", 0.0, 0.0),
        ("it is 1,234.50", "so we get #### 1234.5", 0.0, 1.0),
        ("no number", "46", 0.0, 0.0),
        ("46", "none", 0.0, 0.0),
        ("-3", "3", 0.0, 0.0),
        ("1e3", "1000", 0.0, 1.0),
        ("99.5", "100", 0.01, 1.0),
        ("98.5", "100", 0.01, 0.0),
        ("0.5", ".5", 0.0, 1.0),
    ],
)
def test_numeric_match(completion, answer, tolerance, reward):
    assert numeric_match(completion, {"answer": answer}, tolerance=tolerance) == reward


def test_regex_match():
    assert regex_match("<answer>46</answer>", {}, pattern=r"<answer>.*</answer>") == 1.0
    assert regex_match("46", {}, pattern=r"<answer>.*</answer>") == 0.0
    named = r"= ?(?P<answer>\d+)"
    assert regex_match("12+34 = 46", {"answer": "46"}, pattern=named) == 1.0
    assert regex_match("12+34 = 47", {"answer": "46"}, pattern=named) == 0.0


def test_last_number():
    assert [last_number(t) for t in ("3 then 4,000", "1,23", "x")] == [4000.0, 23.0, None]


def test_a_file_of_rewards_that_is_not_python(tmp_path, monkeypatch):
    file = tmp_path / "rewards.py"
    file.write_text("def reward(completion, row)\n")
    monkeypatch.setattr(rules, "ROOT", tmp_path)
    monkeypatch.setitem(rules.REWARD_FILES, "recipes.rewards", file)
    (problem,) = rules._reward("grpo.rewards.x", {"_target_": "recipes.rewards.reward"})
    assert str(problem).startswith(
        "grpo.rewards.x._target_='recipes.rewards.reward' is in rewards.py, which is not Python"
    )
