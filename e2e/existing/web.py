"""A FastAPI application that tells its pages what happened."""

from __future__ import annotations

from fastapi import FastAPI
from tidings import EventBroadcaster

app = FastAPI()


@app.post("/projects/{project_id}")
async def create_project(project_id: str) -> dict[str, str]:
    await EventBroadcaster.project_created(project_id, {"project_id": project_id, "name": "New"})
    return {"project_id": project_id}


@app.post("/projects/{project_id}/files/{name}")
async def upload(project_id: str, name: str) -> dict[str, str]:
    file_info = {"name": name, "path": f"uploads/{name}", "size": 7, "asset_type": "video"}
    await EventBroadcaster.file_uploaded(project_id, file_info)
    await EventBroadcaster.file_changed(project_id, f"uploads/{name}", "modified")
    await EventBroadcaster.file_deleted(project_id, f"uploads/{name}")
    return {"name": name}
