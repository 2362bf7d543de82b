"""Scoring of long lists: shards of pairs in, a file of answers for each out, on one machine or on Ray.

    from engine.scoring import Work, score

`pairs` reads the lists, `shards` cuts them, `worker` answers a shard, `job` keeps account in a folder, and
`run` does it all. Ray and pyarrow are imported only where they are asked for.
"""

from engine.scoring.entries import Entry
from engine.scoring.pairs import PairList
from engine.scoring.ray_data import Cluster
from engine.scoring.run import score
from engine.scoring.worker import Tally, Work

__all__ = ["Cluster", "Entry", "PairList", "Tally", "Work", "score"]
