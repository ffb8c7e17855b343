"""Products of few rows, as in generating: the kernel as it is kept, turned, and turned as the first factor.

    python benchmarks/products.py [--repeats 20]

Milliseconds of one, the median, where each reads another of a dozen kernels; small ones may stand in a cache.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lmx.kernels.products import product_by_rows

KERNELS = ((768, 768), (768, 3072), (3072, 768))  # of GPT-2's smallest
COPIES = 12
FORMS = {
    "x @ kernel": lambda x, kernel: x @ kernel,
    "x @ turned": lambda x, kernel: jnp.einsum("ri,oi->ro", x, kernel),
    "by rows": product_by_rows,
}


def milliseconds(form: Callable, x: jax.Array, kernels: list[jax.Array], repeats: int) -> float:
    """Of one product, among as many as there are kernels."""
    run = jax.jit(lambda x, kernels: [form(x, kernel) for kernel in kernels])
    jax.block_until_ready(run(x, kernels))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(x, kernels))
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds) / len(kernels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    print(f"| rows | kernel | {' | '.join(FORMS)} |\n|---|---|{'---|' * len(FORMS)}")
    for rows in (1, 2, 8, 32, 64, 128, 512):
        for inputs, outputs in KERNELS:
            x = jax.random.normal(jax.random.key(0), (rows, inputs))
            keys = jax.random.split(jax.random.key(1), COPIES)
            kernels = [jax.random.normal(key, (inputs, outputs)) for key in keys]
            turned = [kernel.T.copy() for kernel in kernels]
            found = [
                milliseconds(form, x, kernels if name == "x @ kernel" else turned, repeats)
                for name, form in FORMS.items()
            ]
            print(f"| {rows} | {inputs} x {outputs} | {' | '.join(f'{ms:.2f}' for ms in found)} |", flush=True)


if __name__ == "__main__":
    main()
