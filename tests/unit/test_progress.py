"""What a person reads of a run: figures in a line, durations in words."""

import io
import logging
import sys

import pytest

from llmga.progress import RunProgress, duration, figures_line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (3599, "59m59s"), (18_420, "5h07m"), (190_800, "2d05h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_figures_that_are_there_come_in_a_fixed_order() -> None:
    line = figures_line(
        {"eta_s": 200, "lr": 2e-5, "tokens_per_s": 12345.6, "loss": 1.5, "grad_norm": 0.25, "cuda_gb": 40}
    )
    assert line == "loss 1.5000  lr 2.00e-05  gradient 0.25  12,346 tokens/s  40.00 GB  3m20s left"
    assert figures_line({"loss": 1.0, "replaced_picture": 0, "replaced_too_long": 0}) == "loss 1.0000"
    line = figures_line({"loss": 1.0, "eta_s": 9, "replaced_picture": 3, "replaced_too_long": 1})
    assert line == "loss 1.0000  9s left  replaced: 3 picture, 1 too long"
    assert figures_line({"loss": 1.0, "left_out": 4}) == "loss 1.0000  4 left out of full rows"
    assert figures_line({"eval_toy_loss": 2.0}) == "held out toy_loss 2.0000"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_bar_shows_step_and_figures_and_held_out_losses_stay_above_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    for name, value in {"TERM": "xterm", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    caplog.set_level(logging.INFO, "llmga.progress")
    with RunProgress(20, shown=True) as progress:
        progress.advance(9)
        progress.report(10, {"loss": 1.5, "lr": 2e-5, "eta_s": 200})
        progress.report(10, {"eval_toy_loss": 2.0})
    last = screen.getvalue().rsplit("\r", 1)[-1]
    assert "10/20" in last and "loss 1.5000  3m20s left" in last and "━" in last
    assert "\x1b[" in last and "lr " not in last
    assert caplog.messages == ["step 10/20  held out toy_loss 2.0000"]


def test_without_a_terminal_one_line_per_log_and_only_on_the_first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: lines.append(record.getMessage()))
    logger = logging.getLogger("llmga.progress")  # a handler of its own: others may hang on the loggers above
    monkeypatch.setattr(logger, "handlers", [handler])
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        for shown in (True, False):
            with RunProgress(20, shown) as progress:
                progress.advance(9)
                progress.report(10, {"loss": 1.0})
    finally:
        logger.setLevel(level)
    assert lines == ["step 10/20  loss 1.0000"]
