"""What is shown while work goes on."""

import io

from rich.console import Console

from pdiff_ray.common import progress


def shown(monkeypatch, live, *updates):
    file = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=file, force_terminal=live, force_jupyter=False, width=100))
    with progress.display() as show:
        for update in updates:
            show(*update)
            if show.bars:
                show.bars.refresh()
    return file.getvalue()


def test_bars_have_their_note_from_the_first_moment_on(monkeypatch):
    """A task is drawn as soon as it is added."""
    text = shown(monkeypatch, True, ("zoo", 1, 3, "run 0"), ("zoo", 3, 3, "shape [b, 3] is no [/x]"))
    assert "run 0" in text
    assert "shape [b, 3] is no [/x]" in text


def test_lines_at_the_start_and_at_the_end(monkeypatch):
    text = shown(monkeypatch, False, ("zoo", 1, 3, "[a]"), ("zoo", 2, 3, "[b]"), ("zoo", 3, 3, "[c]"))
    assert text.splitlines() == ["  zoo: 1/3 [a]", "  zoo: 3/3 [c]"]
