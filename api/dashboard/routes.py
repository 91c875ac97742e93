"""All routes of the dashboard."""

from typing import Final

from api.dashboard import (
    chat_pages,
    comparison_pages,
    dataset_pages,
    job_actions,
    job_list,
    job_pages,
    login,
    result_pages,
    settings_pages,
    static_files,
    submission_pages,
)

ROUTERS: Final = (
    static_files.router,
    login.router,
    job_list.router,
    submission_pages.router,
    job_pages.router,
    result_pages.router,
    job_actions.router,
    chat_pages.router,
    dataset_pages.router,
    comparison_pages.router,
    settings_pages.router,
)
"""In the order in which they are tried: what has a name of its own comes before what has the id of an object there."""
