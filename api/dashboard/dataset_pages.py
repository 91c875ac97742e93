"""Data sets: upload, list, and their samples as a model would see them."""

from typing import Annotated, Final

from anyio import from_thread
from fastapi import APIRouter, Depends, Query, Request, Response

from api.auth import Caller
from api.dashboard.forms import require_form_token
from api.dashboard.rendering import is_fragment_request, redirect, render
from api.datasets.preview import PreviewQuery, preview_dataset
from api.datasets.routes import delete_dataset, get_dataset, list_datasets, upload_dataset
from api.datasets.schemas import PreviewView
from api.datasets.upload import StoredUploadDep
from api.datasets.validation import ValidatorDep
from api.dependencies import DatabaseDep, EncodingCheckerDep, SettingsDep, StoreDep
from api.models.routes import ModelReader, ModelReaderDep
from api.path_params import DatasetId
from api.request_checks import refuse_unknown_parameters
from api.sessions import PlanningSlot, ReadSession, TransactionSlot

router = APIRouter(prefix="/ui/datasets", include_in_schema=False)

_PAGE: Final = 25
_MODELS: Final = 100
_ROWS: Final = 5
_CHECKED = [Depends(refuse_unknown_parameters)]
After = Annotated[str, Query(pattern=r"^[0-9a-z_]{0,64}$")]


@router.get("", dependencies=_CHECKED)
def show_datasets(request: Request, session: ReadSession, caller: Caller, after: After = "") -> Response:
    """The data sets of the project, newest first, and the form to upload one."""
    page = list_datasets(session, caller, _PAGE, after or None)
    address = str(request.base_url).rstrip("/")
    return render(request, "datasets.html", page=page, after=after, address=address)


@router.post("", dependencies=[Depends(require_form_token)])
def upload_file(stored: StoredUploadDep, caller: Caller, request: Request, validator: ValidatorDep) -> Response:
    """Store the file of the form."""
    response = upload_dataset(stored, caller, request, validator)
    return redirect(request, f"/ui/datasets/{response.headers['location'].rpartition('/')[2]}")


@router.get("/{dataset_id}", dependencies=_CHECKED)
def show_dataset(
    request: Request, session: ReadSession, caller: Caller, models: ModelReaderDep, dataset_id: DatasetId
) -> Response:
    """One data set: how it was read, and the form of its preview."""
    dataset = get_dataset(session, caller, dataset_id)
    return render(request, "dataset.html", dataset=dataset, models=_model_paths(models), preview=None, query=None)


@router.get("/{dataset_id}/preview", dependencies=_CHECKED)
def show_preview(
    request: Request,
    database: DatabaseDep,
    slot: PlanningSlot,
    caller: Caller,
    settings: SettingsDep,
    store: StoreDep,
    checker: EncodingCheckerDep,
    models: ModelReaderDep,
    dataset_id: DatasetId,
    model: Annotated[str, Query(min_length=1, max_length=1024)],
    offset: Annotated[int, Query(ge=0, lt=2**31)] = 0,
) -> Response:
    """Some samples as tokens, with those that are trained on."""
    query = PreviewQuery(model=model, offset=offset, rows=_ROWS)
    preview: PreviewView = preview_dataset(database, slot, caller, settings, store, checker, dataset_id, query)
    if is_fragment_request(request):
        return render(request, "preview.html", preview=preview, query=query)
    with database.transaction(write=False) as session:
        dataset = get_dataset(session, caller, dataset_id)
    return render(request, "dataset.html", dataset=dataset, models=_model_paths(models), preview=preview, query=query)


@router.post("/{dataset_id}/delete", dependencies=[Depends(require_form_token)])
def remove_dataset(
    request: Request,
    database: DatabaseDep,
    store: StoreDep,
    caller: Caller,
    dataset_id: DatasetId,
    slot: TransactionSlot,
) -> Response:
    """Delete the data set, unless a job needs it."""
    delete_dataset(database, store, caller, dataset_id, slot)
    return redirect(request, "/ui/datasets")


def _model_paths(models: ModelReader) -> list[str]:
    """The models that are offered; others are named by hand."""
    return [each.path for each in from_thread.run(models.pages.get, (None, _MODELS)).page.rows]
