from pathlib import Path
from ..targets import Request, make_result
from ..planning import make_plan
from ..conversion import default_budget
from ..storage.engine import fit_budget, run
from ..storage.staging import Staging
from ..storage.writing import OutputFiles
from .arrays import ArraySource


def save(tree, path, *, max_shard_bytes=5 * 10**9, durable=True, overwrite=False, workers=2):
    source = ArraySource(tree)
    tensors = list(source.catalog.tensors.values())
    result = make_result(source.catalog, tensors, Request(None, max_shard_bytes))
    plan = make_plan(source.catalog, result.outputs)
    staging = Staging(Path(path), "save", overwrite=overwrite, durable=durable)
    files = OutputFiles(plan, staging, result.lay_file)
    run(
        plan.moves(),
        source.read,
        files.write,
        budget=fit_budget(default_budget(), workers),
        lend=source.lend,
    )
    files.close()
    for p, data in result.side_files.items():
        (staging.files / p).write_bytes(data)
    staging.publish()
