"""Composer runs that the tests of checkpoints read, also with sharded checkpoints."""

import dataclasses
import io
import pickle
import warnings

import torch
from composer import Callback, Trainer
from composer.optim import CosineAnnealingWithWarmupScheduler
from composer.utils import FSDP2Config, dist
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from pss_composer import PatchSamplingSchedule
from pss_composer.pretraining.masking import PatchMasking
from pss_composer.schedules import Cyclic
from pss_composer.training.ema import EMA
from support.checkpoint_files import BUILD


class StopAt(Callback):
    def __init__(self, batch):
        self.batch = batch

    def batch_start(self, state, logger):
        if state.timestamp.batch == self.batch:
            raise KeyboardInterrupt


def train(folder, *, is_pretraining=False, ema=True, stop_at=None, **options):
    """A run of two epochs of four batches, with a checkpoint after each batch; its Trainer."""
    torch.manual_seed(0)
    model = BUILD["pretraining" if is_pretraining else "simmim"]()
    algorithms = [PatchMasking(unit=8) if is_pretraining else PatchSamplingSchedule(Cyclic())]
    dataset = TensorDataset(torch.randn(16, 3, 32, 32), torch.arange(16) % 7)
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(dataset, 4, sampler=dist.get_sampler(dataset)),
        max_duration="2ep",
        optimizers=torch.optim.AdamW(model.parameters(), lr=1e-2),
        schedulers=CosineAnnealingWithWarmupScheduler("1ba"),
        algorithms=algorithms + ([EMA(half_life="3ba")] if ema else []),
        callbacks=[StopAt(stop_at)] if stop_at else [],
        save_folder=str(folder), save_interval="1ba", run_name="run", progress_bar=False, device="cpu", **options,
    )
    try:
        trainer.fit()
    except KeyboardInterrupt:
        assert stop_at
    trainer.close()
    return trainer


def train_sharded(folder):
    """A run of three batches with sharded checkpoints; returns the moving averages after them.

    One process writes them and `split_shards` divides them; test_distributed.py reads what two processes wrote.
    """
    was_initialized = torch.distributed.is_initialized()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # FSDP2 is experimental, says Composer
        dist.initialize_dist("cpu")
        try:
            trainer = train(folder, stop_at=3, parallelism_config={"fsdp": FSDP2Config(state_dict_type="sharded")})
            ema = next(algorithm for algorithm in trainer.state.algorithms if isinstance(algorithm, EMA))
            assert not ema.ema_weights_active
            averages = {name: average.full_tensor() if isinstance(average, DTensor) else average
                        for name, average in ema.ema_model.named_parameters_dict.items()}
        finally:
            if not was_initialized:
                torch.distributed.destroy_process_group()
    for checkpoint in folder.glob("ep*"):
        split_shards(checkpoint)
    return averages


def split_shards(folder):
    """Divide each weight of the model in a folder of shards by its rows, as FSDP2 on two processes does."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for index, info in list(metadata.storage_data.items()):
        if not index.fqn.startswith("state.model."):
            continue
        tensor = torch.load(io.BytesIO(read_entry(folder, info)))
        half = (len(tensor) + 1) // 2
        chunks = metadata.state_dict_metadata[index.fqn].chunks
        chunks.clear()
        del metadata.storage_data[index]
        for rank, (start, rows) in enumerate([(0, tensor[:half]), (half, tensor[half:])]):
            chunks.append(ChunkStorageMetadata(torch.Size([start] + [0] * (rows.ndim - 1)), rows.shape))
            place = dataclasses.replace(index, offset=chunks[-1].offsets, index=rank)
            metadata.storage_data[place] = append_entry(folder / f"__{rank}_0.distcp", to_bytes(rows.clone()), info)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def read_entry(folder, info):
    return (folder / info.relative_path).read_bytes()[info.offset:info.offset + info.length]


def append_entry(shard, content, info):
    """Write an entry at the end of a file of shards; where it is now."""
    with shard.open("ab") as file:
        info = dataclasses.replace(info, relative_path=shard.name, offset=file.tell(), length=len(content))
        file.write(content)
    return info


def to_bytes(contents):
    file = io.BytesIO()
    torch.save(contents, file)
    return file.getvalue()
