"""Reads what wandb's core has written: a `.wandb` file, without wandb's help.

The file is a header of 7 bytes and then LevelDB's log format: blocks of 32 KiB with chunks of 4
bytes checksum, 2 bytes length, 1 byte kind (whole record, first, middle, last), and content. The
records are wandb's public protocol buffers.
"""

import json
import struct

from wandb.proto import wandb_internal_pb2

BLOCK = 32768


def read_records(path):
    """Returns the records of a file, in order."""
    data, at, part, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK  # too short for another chunk
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            records.append(wandb_internal_pb2.Record.FromString(part))
            part = b""
    return records


def key_of(item):
    """Returns the name of a value; W&B splits the names of nested ones."""
    return item.key or "/".join(item.nested_key)


def values_of(items):
    return {key_of(item): json.loads(item.value_json) for item in items}


class RunFile:
    """What a run has logged, in wandb's own words.

    Attributes:
        run: The run's record.
        history: A dict for each row, in order.
        config: By key.
        summary: By key, as a tuple where it is nested.
        metrics: What was defined for a metric, by its name or pattern.
        artifacts: Their records, in order.
    """

    def __init__(self, path):
        self.history, self.config, self.summary, self.metrics, self.artifacts = [], {}, {}, {}, []
        for record in read_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.run = record.run
                self.config |= values_of(record.run.config.update)
            elif kind == "config":
                self.config |= values_of(record.config.update)
            elif kind == "history":
                self.history.append(values_of(record.history.item))
            elif kind == "summary":
                for item in record.summary.update:
                    key = tuple(item.nested_key) or (item.key,)
                    self.summary[key] = json.loads(item.value_json)
            elif kind == "metric":
                self.metrics[record.metric.name or record.metric.glob_name] = record.metric
            elif kind == "artifact":
                self.artifacts.append(record.artifact)

    def values(self, key):
        """Returns the values that were logged under a name, by optimiser step."""
        return {row["trainer/global_step"]: row[key] for row in self.history if key in row}
