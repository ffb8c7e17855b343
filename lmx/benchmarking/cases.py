"""What is measured: the models, their sizes and the goals."""

import dataclasses

from lmx.config import Config, Data, Experts, Mesh, Model, Objective, Optimizer, Tokenizer, Train

SUITES = ("cpu", "gpu")
SYSTEMS = {
    "lmx": "this library, jit on all devices",
    "eager": "PyTorch, transformers, SDPA attention, fused AdamW",
    "compiled": "the same through torch.compile",
    "twin": "lmx at the dense model that does as many FLOPs a token as this sparse one",
}
PEERS = ("eager", "compiled")


@dataclasses.dataclass(frozen=True)
class Case:
    """A piece of work that every system does: the same parameters, the same inputs, the same that has to come out.

    Attributes:
      name: of the work, such as "train gpt2 small".
      kind: "training", "generation", "loading" or "input".
      config: the model, and for training the batch.
      systems: who does it.
      goal: how many times as fast as the best peer lmx is to be, at least.
      utilization: the part of the measured peak of matrix products that lmx is to reach, at least.
      documents: what a row holds: "whole", one document; "padded", one that is shorter; "packed", several such.
      twin: a dense model for a sparse one, at which lmx takes turns with the rest; ``at_most`` is how many times as
        long the sparse one may take.
      prompts, prompt_length, new_tokens: of generation: how many prompts, and tokens of each and after each.
    """

    name: str
    kind: str
    config: Config
    systems: tuple[str, ...] = ("lmx", *PEERS)
    goal: float | None = 1.0
    utilization: float | None = None
    documents: str = "whole"
    twin: Config | None = None
    at_most: float | None = None
    prompts: int = 0
    prompt_length: int = 64
    new_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a model and its batch.

    Attributes:
      layers: of each stack.
      rows, length: of the batch; an encoder-decoder's targets are a quarter as long.
      scan_layers: see :class:`lmx.config.Model`; on a CPU a step is faster without, which need not cut and join the
        stacked parameters.
    """

    layers: int
    width: int
    rows: int
    length: int
    dtype: str = "float32"
    scan_layers: bool = True


def cases(suite: str, platform: str) -> list[Case]:
    """The cases of a suite; those of "gpu" are shrunk where there is none, so that they can be tried."""
    if suite == "cpu":
        return _cpu()
    return _gpu() if platform == "gpu" else [_shrunk(case) for case in _gpu()]


def _cpu() -> list[Case]:
    small, base = Size(4, 256, 8, 128, scan_layers=False), Size(4, 768, 4, 128, scan_layers=False)
    found = []
    # PyTorch compiles for so long that of the larger ones only GPT-2 is compiled; the others gain at most 2 % by it.
    for name, size, systems in (("small", small, ("lmx", *PEERS)), ("base-shaped", base, ("lmx", "eager"))):
        found += [
            Case(f"train gpt2 {name}", "training", gpt2(size)),
            Case(f"train bert {name} padded", "training", bert(size, packing=False), systems, documents="padded"),
            Case(f"train bert {name} packed", "training", bert(size), systems, documents="packed"),
            Case(f"train t5 {name}", "training", t5(size), systems),
        ]
    found += [
        switch("train switch small", dataclasses.replace(small, layers=2)),
        switch("train switch base-shaped", dataclasses.replace(base, layers=2), at_most=1.25),
    ]
    decoder = gpt2(dataclasses.replace(base, layers=12, scan_layers=True))
    found += [
        Case(
            f"generate gpt2 124m, batch {rows}",
            "generation",
            decoder,
            ("lmx", "eager"),
            goal,
            prompts=rows,
            prompt_length=length,
            new_tokens=new,
        )
        for rows, length, new, goal in ((1, 64, 32, 2.0), (8, 64, 16, 2.0), (64, 16, 4, None))
    ]
    read = Case("input of bert small", "input", bert(dataclasses.replace(small, rows=32)), ("lmx", "eager"), None)
    return [*found, read, Case("load gpt2 124m", "loading", decoder, ("lmx", "eager"), None)]


def _gpu() -> list[Case]:
    half = "bfloat16"
    medium, long = Size(12, 768, 16, 1024, half), Size(12, 768, 32, 512, half)
    small = Size(6, 512, 32, 512, half)
    large = gpt2(Size(48, 1600, 8, 1024, half, scan_layers=False), heads=25)  # unrolled: a loop copies what it keeps
    no_goal = {"systems": ("lmx", "eager"), "goal": None}
    generated = [
        Case(f"generate gpt2 124m, batch {rows}", "generation", gpt2(medium), goal=goal, prompts=rows, new_tokens=128)
        for rows, goal in ((64, 3.0), (8, None), (1, None))
    ]
    return [
        Case("train gpt2 124m", "training", gpt2(medium), goal=1.2, utilization=0.55),
        Case("train bert base packed", "training", bert(long), documents="packed", goal=1.3),
        generated[0],
        Case("train t5 base", "training", t5(long), goal=1.2, utilization=0.4),
        Case("train gpt2 1558m", "training", large, ("lmx",), None, utilization=0.6),  # two do not fit on one card
        switch("train switch base 8", long, goal=1.2, utilization=0.4),
        Case("train bert base padded", "training", bert(long, packing=False), documents="padded"),
        *generated[1:],
        Case("train bert small packed", "training", bert(small), documents="packed", **no_goal),
        Case("train t5 small", "training", t5(small), **no_goal),
        switch("train switch small 8", small, goal=None),
        Case("input of bert base", "input", bert(long), ("lmx", "eager"), None),
        Case("load gpt2 124m", "loading", gpt2(medium), ("lmx", "eager"), None),
    ]


def _shrunk(case: Case) -> Case:
    model = {"num_layers": 2, "embed_dim": 64, "num_heads": 2, "mlp_dim": 128, "vocab_size": 512, "dtype": "float32"}
    shape = {"model": model, "data": {"length": 64, "target_length": 16}, "train": {"global_batch_size": 2}}
    config, twin = case.config.replace(**shape), case.twin and case.twin.replace(**shape)
    systems = tuple(system for system in case.systems if system != "compiled")
    new_tokens = min(case.new_tokens, 8)
    return dataclasses.replace(case, config=config, twin=twin, systems=systems, new_tokens=new_tokens)


def gpt2(size: Size, heads: int | None = None) -> Config:
    """A GPT-2 of a size, predicting the next token."""
    return _config(
        size,
        Objective(name="causal"),
        vocab_size=50257,
        activation="gelu_tanh",
        max_length=1024,
        num_heads=heads or size.width // 64,
    )


def bert(size: Size, packing: bool = True) -> Config:
    """A BERT of a size, predicting 15 % of the tokens."""
    config = _config(
        size,
        Objective(name="mlm"),
        architecture="encoder",
        heads=("mlm",),
        vocab_size=30522,
        max_length=512,
        norm_position="post",
        norm_epsilon=1e-12,
        activation="gelu",
        num_token_types=2,
        embedding_norm=True,
    )
    return config.replace(data={"packing": packing})


def t5(size: Size, experts: int = 0) -> Config:
    """A T5 of a size; with experts, a Switch Transformer with a sparse feed-forward in every other layer."""
    return _config(
        size,
        Objective(name="seq2seq"),
        architecture="encoder_decoder",
        vocab_size=32128,
        head_dim=64,
        norm="rmsnorm",
        norm_epsilon=1e-6,
        use_bias=False,
        position="relative",
        attention_scale="none",
        activation="relu",
        scale_logits=True,
        initializer="fan_in",
        init_scale=0.1 if experts else 1.0,
        embedding_stddev=1.0,
        experts=Experts(num_experts=experts, every=2, decoder_every=2, first=1, capacity_factor=1.25, jitter=0.0),
    )


def switch(name: str, size: Size, **goals: float | None) -> Case:
    """Training a Switch Transformer of a size, beside its dense twin."""
    return Case(name, "training", t5(size, experts=8), ("lmx", "eager", "twin"), twin=t5(size), **goals)


def _config(size: Size, objective: Objective, vocab_size: int, **model) -> Config:
    shape = {"num_layers": size.layers, "embed_dim": size.width, "mlp_dim": 4 * size.width}
    shape |= {"dtype": size.dtype, "scan_layers": size.scan_layers}
    return Config(
        model=Model(**{"num_heads": size.width // 64, "vocab_size": vocab_size} | shape | model),
        objective=objective,
        data=Data(train="builtin:python_manual", length=size.length, target_length=size.length // 4),
        tokenizer=Tokenizer(kind="bytes"),
        optimizer=Optimizer(learning_rate=1e-4, weight_decay=0.01, clip_norm=1.0),
        train=Train(steps=1000, global_batch_size=size.rows),
        mesh=Mesh(),
    )
