"""DeepSpeed ZeRO-Inference (stage 3, parameters in pinned RAM or on NVMe), on a GPU with a budget.

How to run (the first line makes an environment of pinned versions; from RAM nothing is compiled, from disk the
operator async_io is at first use, for which CFLAGS and LDFLAGS must lead to libaio, and TORCH_CUDA_ARCH_LIST be a
number, as 9.0):

    PYTHON=$(python benchmarks/peers/environments.py deepspeed ENVIRONMENTS)
    $PYTHON benchmarks/gpu_peers/deepspeed_zero.py --checkpoint FOLDER --gpu-memory BYTES --out FILE.json [--from disk]

Where nothing can be fetched but torch, transformers and accelerate are installed: wheels from elsewhere, deepspeed's
made with `DS_BUILD_OPS=0 pip wheel --no-deps deepspeed==0.19.8`, with hjson's and pydantic's in a folder that
PYTHONPATH names.

Stage 3 without an optimizer. transformers loads the model into RAM, and DeepSpeed parts it from there, because within
the budget transformers' own integration, which makes every module on the GPU and parts it there, runs out of memory
(`--integrated` shows it). Parameters are fetched on a stream of their own ahead of their use, `--prefetch-matrices` of
the largest matrices at a time, and as far ahead as `stage3_max_live_parameters` lets it, which is what is planned for
them; those that fit stay on the GPU, up to `stage3_model_persistence_threshold`, in the order of use, and take twice
their size there. What a placement that ran out of memory took is never given back, so that all further ones fail, too:
begin with less then, by `--resident`. From disk: `--nvme-folder` must have room for the weights, and RAM for 64 pinned
buffers of the largest matrix; with 16 it ends in "Not enough buffers".
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from measurement import Options, Rows, Shape, arguments, cases, limit_gpu, parse, run

SLACK_BYTES = 256 << 20
"""Less weights that stay, so that the first placement, which takes long, need not be repeated."""


class DeepSpeedZero:
    """The engine; a placement means to build it anew."""

    def __init__(self, options: Options, *, given: argparse.Namespace) -> None:
        import deepspeed

        deepspeed.init_distributed(dist_backend=given.backend, auto_mpi_discovery=False)
        self._options, self._nvme_folder, self._integrated = options, given.nvme_folder, given.integrated
        self._shape = Shape.of(options.checkpoint)
        matrix = self._shape.hidden * self._shape.intermediate
        self._prefetch = given.prefetch_matrices * matrix
        # The head is fetched whole; what is prefetched comes beside the matrix in use and the one before it.
        in_flight = max(2 * (self._prefetch + 2 * matrix), self._shape.largest_matrix_bytes + 2 * matrix)
        self.in_flight_bytes = in_flight + SLACK_BYTES
        self.model: Any = None
        self._engine: Any = None
        self._integration: Any = None

    def place(self, resident_bytes: int) -> str:
        """Load the model with so many bytes of parameters that stay."""
        import deepspeed
        from deepspeed.runtime.zero.partition_parameters import Init
        from transformers import AutoModelForCausalLM
        from transformers.integrations import HfDeepSpeedConfig

        self._close()
        Init.num_persisted_parameters = Init.num_persisted_elements = 0
        # What stays is on the GPU twice: as its partition, and gathered.
        config = self._config(max(0, resident_bytes) // 4)
        if self._integrated:
            self._integration = HfDeepSpeedConfig(config)  # `from_pretrained` looks for it
        model = AutoModelForCausalLM.from_pretrained(self._options.checkpoint, dtype=torch.bfloat16).eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        if not self._integrated:  # the engine would put the whole model onto the GPU first
            deepspeed.zero.Init(module=model, config_dict_or_path=config)
        self._engine = deepspeed.initialize(model=model, config=config)[0]
        self._engine.module.eval()
        self.model = self._engine.module
        staying = sum(2 * parameter.ds_numel for parameter in model.parameters() if parameter.ds_persist)
        where = "on NVMe" if self._options.from_disk else "in pinned RAM"
        return f"{staying / 1e6:.1f} MB of weights on the GPU, the others {where}; prefetch bucket {self._prefetch}"

    def _config(self, persistent: int) -> dict[str, Any]:
        """DeepSpeed's; counts are of parameters."""
        matrix = self._shape.hidden * self._shape.intermediate
        everything = 1 << 40
        offload: dict[str, Any] = {"device": "cpu", "pin_memory": self._options.device == "cuda"}
        if self._options.from_disk:
            largest = max(matrix, self._shape.largest_matrix_bytes // 2)
            offload = {
                "device": "nvme", "nvme_path": str(self._nvme_folder), "pin_memory": True, "buffer_size": largest,
                "buffer_count": 64, "max_in_cpu": 0,
            }  # fmt: skip
        return {
            "bf16": {"enabled": True},
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {
                "stage": 3,
                "overlap_comm": True,
                "contiguous_gradients": False,
                "offload_param": offload,
                "stage3_prefetch_bucket_size": self._prefetch,
                "stage3_max_live_parameters": self.in_flight_bytes // 2,
                "stage3_max_reuse_distance": 0,
                "stage3_param_persistence_threshold": everything,
                "stage3_model_persistence_threshold": persistent,
            },
            "aio": {"block_size": 1 << 20, "queue_depth": 16, "intra_op_parallelism": 4, "overlap_events": True},
        }

    def _close(self) -> None:
        self.model = None
        if self._engine is not None:
            self._engine.destroy()
            self._engine = None
        gc.collect()
        if self._options.device == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    """The command line."""
    parser = arguments(__doc__)
    parser.add_argument("--prefetch-matrices", type=int, default=2, help="of the MLP's size (default: %(default)s)")
    # A gather among one is a copy: nothing is ever sent, and NCCL would take its share of the budget.
    parser.add_argument("--backend", default="gloo", help="of torch.distributed (default: %(default)s)")
    parser.add_argument("--integrated", action="store_true", help="transformers parts the model as it makes it")
    parser.add_argument("--nvme-folder", type=Path, default=Path(tempfile.gettempdir()) / "deepspeed-nvme")
    options = parse(parser)
    # One process; said before deepspeed looks for an MPI.
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.setdefault("MASTER_PORT", "29517")
    if options.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    allowed = limit_gpu(options)
    rows = Rows(options, "deepspeed", ("deepspeed", "transformers", "torch", "accelerate"))
    found = cases(options)
    groups = [[case for case in found if case.kind == kind] for kind in ("decode", "prompt")]
    groups = [group for group in groups if group]  # a placement takes long: one for all batches
    run(options, rows, lambda: DeepSpeedZero(options, given=options.extra), groups=groups, allowed=allowed)


if __name__ == "__main__":
    main()
