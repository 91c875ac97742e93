"""The models below the model roots over HTTP."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request

from api.auth import Caller
from api.models.schemas import ModelPage, ModelView, present_model
from api.pagination import Limit
from api.problems import COMMON_PROBLEMS, problem_responses
from api.single_flight import SingleFlightCache
from domain.model_catalog import ListedModel, ModelCatalog, ModelListing, ModelNotListed

router = APIRouter(prefix="/models", tags=["models"], responses=COMMON_PROBLEMS)

_PATH = r"^[^\x00-\x1f\x7f]{1,1024}$"
ModelId = Annotated[
    str,
    Path(pattern=_PATH, description="The path of a model, for instance `smollm2-135m-instruct`; with its slashes."),
]
AfterPath = Annotated[
    str | None,
    Query(pattern=_PATH, description="The path after whose model the page begins: `last_id` of the previous page."),
]
_PageKey = tuple[str | None, int]


class ModelReader:
    """Reads models in threads of its own, so that other requests keep theirs; requests for the same share one read."""

    def __init__(self, catalog: ModelCatalog) -> None:
        def read_page(key: _PageKey) -> ModelListing:
            after, limit = key
            return catalog.list_models(after=after, limit=limit)

        # The catalog remembers what the files say; where they are is looked at each time.
        self.pages: SingleFlightCache[_PageKey, ModelListing] = SingleFlightCache(read_page, lambda *_: False, 0)
        self.models: SingleFlightCache[str, ListedModel] = SingleFlightCache(catalog.get_model, lambda *_: False, 0)


async def _get_model_reader(request: Request) -> ModelReader:
    reader: ModelReader = request.app.state.model_reader
    return reader


ModelReaderDep = Annotated[ModelReader, Depends(_get_model_reader)]


@router.get("", summary="List the models")
async def list_models(_caller: Caller, reader: ModelReaderDep, limit: Limit = 20, after: AfterPath = None) -> ModelPage:
    """The models below the model roots, by path, with what their files say: which may be teacher or student, and why
    others may not. Models of the Hub and checkpoints of jobs, which may be either as well, are not among them.
    """
    listing = await reader.pages.get((after, limit))
    page = ModelPage.from_rows(listing.page, present_model, lambda model: model.path)
    return page.model_copy(update={"complete": listing.complete})


@router.get("/{model_id:path}", summary="Get a model", responses=problem_responses(ModelNotListed))
async def get_model(_caller: Caller, reader: ModelReaderDep, model_id: ModelId) -> ModelView:
    """One model below the model roots, with what its files say."""
    return present_model(await reader.models.get(model_id))
