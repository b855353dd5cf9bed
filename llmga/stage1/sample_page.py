"""Pages that show what the model answers as it learns: one per step, and one that follows each conversation.

Each page is one file: pictures are inside it, nothing is fetched.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup, escape
from PIL import Image

from llmga.files import atomic_write
from llmga.images import data_url
from llmga.runtime import MetricsLog
from llmga.stage1.conversation import Turn
from llmga.tokens import TAG_LITERALS

_THUMBNAIL_PX = 256


@dataclass(frozen=True)
class Question:
    """A held-out conversation up to its last question, and the answer that was expected."""

    turns: Sequence[Turn]
    expected: str
    picture: Image.Image | None = None
    title: str = field(default="")  # task and source, for people


class SamplePages:
    """Writes `samples/`: `step-<n>.html`, `index.html` and the replies themselves in `replies.jsonl`.

    Args:
        folder: made when missing.
        questions: the same at every step.
    """

    def __init__(self, folder: Path, questions: Sequence[Question]) -> None:
        self.folder, self.questions = folder, list(questions)
        folder.mkdir(parents=True, exist_ok=True)
        self.log = MetricsLog(folder / "replies.jsonl")

    def cut_after(self, step: int) -> None:
        """Forget the replies past `step`, which the resumed run will write again."""
        for line in self.log.read():
            if line["step"] > step:
                (self.folder / f"step-{line['step']}.html").unlink(missing_ok=True)
        self.log.cut_after(step)

    def write(self, step: int, replies: Sequence[str]) -> Path:
        """Add the replies of a step, one per question, and return the page of this step."""
        self.log.write(step, replies=list(replies))
        page = self.folder / f"step-{step}.html"
        atomic_write(page, self._page(f"Replies after step {step}", [(step, list(replies))]))
        history = {line["step"]: line["replies"] for line in self.log.read()}
        steps = sorted(((n, said) for n, said in history.items() if len(said) == len(self.questions)), reverse=True)
        atomic_write(self.folder / "index.html", self._page("Replies while learning", steps, links=True))
        return page

    def _page(self, title: str, steps: list[tuple[int, list[str]]], links: bool = False) -> str:
        rows: list[dict[str, Any]] = [
            {
                "title": question.title,
                "picture": _thumbnail(question.picture),
                "small": question.picture is not None and max(question.picture.size) < _THUMBNAIL_PX // 2,
                "turns": question.turns,
                "expected": _with_tags(question.expected),
                "replies": [(step, _with_tags(said[number])) for step, said in steps],
            }
            for number, question in enumerate(self.questions)
        ]
        return _TEMPLATE.render(title=title, rows=rows, pages=[step for step, _ in steps] if links else [])


def _thumbnail(picture: Image.Image | None) -> str | None:
    """A small copy of a picture as the text of an `src` attribute."""
    if picture is None:
        return None
    small = picture.convert("RGB")
    small.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    return data_url(small)


def _with_tags(text: str) -> Markup:
    """Text for a page, the generation tags set off from it."""
    shown = str(escape(text))
    for tag in TAG_LITERALS:
        shown = shown.replace(str(escape(tag)), f"<b>{escape(tag)}</b>")
    return Markup(shown)


_TEMPLATE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  :root { color-scheme: light dark; }
  body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
  article { display: grid; grid-template-columns: minmax(8rem, 16rem) 1fr; gap: 1rem; padding: 1rem 0;
            border-top: 1px solid #8886; }
  img { width: 100%; border-radius: 4px; } img.small { image-rendering: pixelated; }
  dl { margin: 0; } dt { font-size: 12px; opacity: .7; } dd { margin: 0 0 .6rem; white-space: pre-wrap;
       overflow-wrap: anywhere; }
  b { color: #b25000; font-weight: 600; } .expected { opacity: .75; } h2 { font-size: 13px; margin: 0 0 .5rem; }
  @media (max-width: 40rem) { article { grid-template-columns: 1fr; } }
</style>
<h1>{{ title }}</h1>
{% if pages %}
<p>One page per step:{% for step in pages %} <a href="step-{{ step }}.html">{{ step }}</a>{% endfor %}</p>
{% endif %}
{% for row in rows %}
<article>
  <div>
    {% if row.picture %}
    <img {% if row.small %}class="small" {% endif %}src="{{ row.picture }}" alt="the picture shown to the model">
    {% else %}no picture{% endif %}
  </div>
  <dl>
    {% if row.title %}<h2>{{ row.title }}</h2>{% endif %}
    {% for turn in row.turns %}
    <dt>{{ turn.role }}{% if turn.has_picture %} (with the picture){% endif %}</dt><dd>{{ turn.content }}</dd>
    {% endfor %}
    {% for step, reply in row.replies %}
    <dt>reply after step {{ step }}</dt><dd>{{ reply or "(nothing)" }}</dd>
    {% endfor %}
    <dt>expected</dt><dd class="expected">{{ row.expected }}</dd>
  </dl>
</article>
{% endfor %}
</html>
""")
