"""Every kind of problem that a check can find: its code, how bad it is, what it means and what to do.

One row per kind. Codes are what `--ignore` and `--drop` take and what reports file findings under; they do not change.
An *error* keeps a row from training, or trains it on the wrong thing; a *warning* deserves a look; a *note* is a fact
that the loader handles well and that is good to know.
"""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of problem.

    Attributes:
        code: its name for programs.
        meaning: what was found, one sentence without its full stop.
        remedy: what to do about it, likewise.
    """

    code: str
    severity: Severity
    meaning: str
    remedy: str


_FETCH = "fetch the file again, or remove the rows"
_REMOVE = "mend or remove the row; --fix leaves it out"
_LOOK = "look at a few of them"
_NOTHING = "nothing: the loader does the right thing"

_ROWS: tuple[tuple[str, Severity, str, str], ...] = (
    # files
    ("unreadable_file", "error", "A file cannot be read as rows at all", "see the sentence beside it"),
    ("not_json", "error", "Text is not valid JSON", "mend it at the place named"),
    ("not_utf8", "error", "Text is not UTF-8, or holds half a character", "save the file as UTF-8"),
    ("cut_short", "error", "The file ends in the middle of a row", "fetch the file again"),
    ("unknown_format", "error", "The first row has the fields of no known format", "name the format with --format"),
    ("no_rows", "error", "The file has no rows", "check the path, or fetch the file again"),
    # rows
    ("wrong_type", "error", "A row or a field is of another type than expected", _REMOVE),
    ("unknown_field", "error", "A manifest row has a field that does not exist", "rename it, or move it into 'meta'"),
    ("unknown_task", "error", "A row names a task that does not exist", _REMOVE),
    ("missing_field", "error", "A field that the row's task needs is missing", _REMOVE),
    ("empty_text", "error", "A text that the row's task needs is empty", _REMOVE),
    ("broken_turns", "error", "Questions and answers do not alternate, or do not pair up", _REMOVE),
    ("unbalanced_tags", "error", "A training target holds a generation tag that is not closed or opened", _REMOVE),
    ("tag_in_target", "error", "A training target already holds generation tags, which the loader adds", _REMOVE),
    ("placeholder_in_target", "error", "A training target holds a literal picture placeholder", _REMOVE),
    ("placeholder_without_picture", "error", "A text has a picture placeholder, the row no picture", _REMOVE),
    ("picture_without_placeholder", "note", "A row has a picture and its text no placeholder for it", _NOTHING),
    ("picture_not_used", "warning", "A row of a text-only task names a picture", "change its task to vqa, or drop it"),
    ("placeholder_in_text", "warning", "A turn of a manifest holds a literal placeholder, read as plain text", _LOOK),
    ("tag_in_conversation", "warning", "A recorded turn holds generation tags, read as plain text", _LOOK),
    ("changed_by_reader", "note", "The reader of a published format changes the row, as the detail says", _NOTHING),
    ("odd_characters", "warning", "A text holds control or replacement characters, or a wrongly decoded one", _LOOK),
    ("prompt_cut", "warning", "A prompt is longer than the most windows that stage 2 gives it", "raise --max-chunks"),
    ("too_long", "warning", "A row's texts have more LLM tokens than --max-length", "the loader replaces such rows"),
    ("duplicate_id", "warning", "An id occurs in an earlier row of the file", "give each row an id of its own"),
    ("duplicate_row", "warning", "A row says the same as an earlier one", "--fix --drop duplicate_row leaves it out"),
    ("duplicate_text", "note", "A caption occurs in an earlier row with another picture", _LOOK),
    # pictures
    ("picture_path", "error", "A picture's path is absolute, empty or has backslashes", "write it relative, with /"),
    ("picture_outside", "error", "A picture's path leaves the picture folder", "move it below, or set --image-root"),
    ("picture_missing", "error", "A picture does not exist", "fetch it, or set --image-root"),
    ("picture_case", "error", "A picture's name is written in another case than the file's", "rename one of the two"),
    ("picture_unreadable", "error", "A picture cannot be read from the disk", "check permissions and disk"),
    ("picture_empty", "error", "A picture's file is empty", _FETCH),
    ("not_a_picture", "error", "A file is not a picture, whatever its suffix says", _FETCH),
    ("picture_damaged", "error", "A picture is damaged or cut short", _FETCH),
    ("picture_too_large", "error", "A picture has more pixels than the guard against bombs allows", "shrink it"),
    ("picture_values", "error", "A picture's values have no known range", "save it with 8 or 16 bits"),
    ("picture_crashes", "error", "The process that decoded a picture died, out of memory or by a fault", _FETCH),
    ("wrong_suffix", "warning", "A picture is of another type than its suffix says", "rename it; training reads it"),
    ("animated", "warning", "A picture is animated; its first frame is used", _LOOK),
    ("small_picture", "warning", "A picture's short side is below --min-side", _LOOK),
    ("extreme_ratio", "warning", "A picture's sides differ by more than --max-ratio", "remove it, or mode pad"),
    ("blank_picture", "warning", "A picture is a single colour", _LOOK),
    ("rotated", "note", "A picture carries an EXIF rotation, which is applied", _NOTHING),
    ("alpha", "note", "A picture has transparency; it is laid on white", _NOTHING),
    ("palette", "note", "A picture has a palette and becomes RGB", _NOTHING),
    ("cmyk", "note", "A picture is CMYK and becomes RGB without a colour profile", _LOOK),
    ("grey", "note", "A picture is grey and becomes RGB", _NOTHING),
    ("deep", "note", "A picture has 16 bits per value and becomes 8-bit", _NOTHING),
    ("duplicate_picture", "warning", "A picture's file equals another one byte for byte", "keep one of them"),
    ("near_duplicate", "note", "A picture looks like another one", _LOOK),
    ("in_reference", "error", "A picture is, or looks like, one of the reference set", "remove it from one of the two"),
    ("split_leak", "error", "A training row shares its picture with a validation or test row", "move one of the rows"),
    ("orphan", "note", "A picture below the picture folder is used by no row", "nothing, or move it away"),
    ("folder_incomplete", "warning", "A known folder holds fewer pictures than was published", "fetch the rest"),
    # masks
    ("mask_empty", "error", "A mask hides nothing, so there is nothing to generate", "make it white where to generate"),
    ("mask_aspect", "warning", "A mask has another shape than its picture", "right with picture_mode squash alone"),
    ("mask_size", "note", "A mask is smaller or larger than its picture; it is scaled", _NOTHING),
    ("mask_grey", "warning", "A mask has values between black and white; 125 and above generate", _LOOK),
    ("mask_area", "warning", "A mask covers less or more of its picture than --mask-area", _LOOK),
    ("mask_not_border", "warning", "An outpainting mask does not keep one rectangle", "call the task inpainting"),
    # archives
    ("archive_missing", "error", "An archive of the list does not exist, or is a partial download", "fetch the rest"),
    ("archive_differs", "error", "An archive is not the published one", "fetch it again"),
    ("little_disk", "warning", "The disk has less free space than the archives take unpacked", "make room"),
)
KINDS: dict[str, Kind] = {row[0]: Kind(*row) for row in _ROWS}
