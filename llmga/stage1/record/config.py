"""Settings of recording: a trained MLLM writes the generation prompt of every row of a manifest, once."""

from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field as Limits
from pydantic.dataclasses import dataclass

from llmga.config import STRICT, AtLeastOne, combination
from llmga.records import GenerationTask
from llmga.stage1.config import DataConfig, SourceConfig, without_model


@dataclass(config=STRICT)
class EndpointConfig:
    """A server that speaks OpenAI's chat completions, such as vLLM's."""

    url: str  # up to and including /v1
    model: str  # the name that the server knows the model by
    key_env: str = "OPENAI_API_KEY"  # environment variable with the key; not needed where the server wants none
    concurrency: AtLeastOne = 32  # requests under way at a time
    timeout_s: AtLeastOne = 120  # of one request
    retries: Annotated[int, Limits(ge=0)] = 6  # of a request that failed: busy, unreachable, answered with nonsense
    backoff_s: Annotated[float, Limits(gt=0)] = 1.0  # before the first retry; doubled at each one, up to a minute
    extra: dict[str, object] = field(default_factory=dict)  # more keys of the request's body

    @combination("url")
    def _is_http(self) -> str | None:
        if self.url.startswith(("http://", "https://")):
            return None
        return f"found {self.url}, expected the address of a server, such as http://localhost:8000/v1"


@dataclass(config=STRICT)
class SamplingConfig:
    """How replies are drawn."""

    temperature: Annotated[float, Limits(ge=0)] = 0.2
    top_p: Annotated[float, Limits(gt=0, le=1)] = 1.0
    max_new_tokens: AtLeastOne = 512
    attempts: AtLeastOne = 3  # a malformed reply is drawn again with another seed, so many times in all
    retry_temperature: Annotated[float, Limits(gt=0)] = 0.7  # of further attempts, where temperature is lower


@dataclass(config=STRICT)
class RecordConfig:
    """Which rows, by which model, and where to."""

    source: SourceConfig  # the rows; weight is not used
    out: Path  # the manifest to make, .jsonl or .parquet; work in progress lies in the folder <out>.parts
    model: Path | None = None  # folder of an MLLM; None with an endpoint
    endpoint: EndpointConfig | None = None  # ask a server instead
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    task: GenerationTask | None = None  # what to ask for; None: each row's own task, rows without generation left out
    reply: Literal["tagged", "plain"] = "tagged"  # the prompt is what stands between tags, or the whole reply
    phrasing: Literal["train", "held_out"] = "train"  # which instructions are drawn
    language: str = DataConfig.language  # of the instructions
    picture_size: AtLeastOne = 512  # pixels a side of what the model is shown; masks are drawn at it
    picture_mode: Literal["squash", "crop", "pad", "laion", "clip"] = DataConfig.picture_mode
    batch_size: AtLeastOne = 32  # rows written to the disk together, and answered together by a model of ours
    precision: Literal["bf16", "fp32"] = "bf16"  # of the model's weights
    max_chunks: AtLeastOne = 4  # of 75 CLIP tokens: what the statistics count lost words by
    seed: Annotated[int, Limits(ge=0, lt=2**32)] = 0
    threads: AtLeastOne | None = None  # CPU threads per process; None leaves torch's choice

    @combination("model", "endpoint")
    def _one_engine(self) -> str | None:
        if (self.model is None) != (self.endpoint is None):
            return None
        both = "both" if self.model is not None else "neither"
        return f"found {both}, expected one of the two: the folder of an MLLM, or a server's url and model name"

    @combination("model", machine=True)
    def _model_folder(self) -> str | None:
        return without_model(self.model, "an MLLM as stage 1 saves it")

    @combination("out")
    def _known_suffix(self) -> str | None:
        if self.out.suffix in (".jsonl", ".parquet"):
            return None
        return f"found {self.out}, expected a name that ends in .jsonl or .parquet"
