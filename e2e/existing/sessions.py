"""Applications with a login, each with the sessions of another library, as its documentation sets them up."""

from __future__ import annotations

import uuid
from typing import Any

import redis
import redis.asyncio
from fastapi import Depends, FastAPI
from fastapi_users import BaseUserManager, FastAPIUsers, UUIDIDMixin
from fastapi_users.authentication import AuthenticationBackend, CookieTransport, RedisStrategy
from fastapi_users.db import BaseUserDatabase
from flask import Flask
from flask import request as flask_request
from flask import session as flask_session
from flask_session import Session
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starsessions import SessionAutoloadMiddleware
from starsessions import SessionMiddleware as StoredSessionMiddleware
from starsessions.stores.redis import RedisStore


async def login(request: Request) -> JSONResponse:
    """Whatever is posted becomes the session: nobody's password matters here."""
    request.session.update(await request.json())
    return JSONResponse({})


async def logout(request: Request) -> JSONResponse:
    request.session.clear()
    return JSONResponse({})


ROUTES = [Route("/login", login, methods=["POST"]), Route("/logout", logout, methods=["POST"])]


def with_starlette(secret: str, **options: Any) -> Starlette:
    return Starlette(routes=ROUTES, middleware=[Middleware(SessionMiddleware, secret_key=secret, **options)])


def with_starsessions(redis_url: str, **options: Any) -> Starlette:
    store = RedisStore(connection=redis.asyncio.Redis.from_url(redis_url))
    middleware = [
        Middleware(StoredSessionMiddleware, store=store, **options),
        Middleware(SessionAutoloadMiddleware),
    ]
    return Starlette(routes=ROUTES, middleware=middleware)


def with_flask_session(redis_url: str, **options: Any) -> Flask:
    app = Flask("existing")
    app.config.update(SESSION_TYPE="redis", SESSION_REDIS=redis.Redis.from_url(redis_url), **options)
    Session(app)

    @app.post("/login")
    def login() -> dict[str, str]:
        flask_session.update(flask_request.get_json())
        return {}

    @app.post("/logout")
    def logout() -> dict[str, str]:
        flask_session.clear()
        return {}

    return app


class User:
    def __init__(self, **values: Any) -> None:
        self.id = uuid.uuid4()
        self.email: str = values["email"]
        self.hashed_password: str = values["hashed_password"]
        self.is_active = self.is_verified = True
        self.is_superuser = False


class Users(BaseUserDatabase[User, uuid.UUID]):
    """In place of a database."""

    def __init__(self) -> None:
        self._users: dict[uuid.UUID, User] = {}

    async def get(self, id: uuid.UUID) -> User | None:
        return self._users.get(id)

    async def get_by_email(self, email: str) -> User | None:
        return next((user for user in self._users.values() if user.email == email), None)

    async def create(self, create_dict: dict[str, Any]) -> User:
        user = User(**create_dict)
        self._users[user.id] = user
        return user


class UserManager(UUIDIDMixin, BaseUserManager[User, uuid.UUID]):
    reset_password_token_secret = verification_token_secret = "a secret of the application's"


def with_fastapi_users(redis_url: str, **options: Any) -> FastAPI:
    client = redis.asyncio.Redis.from_url(redis_url, decode_responses=True)
    app, manager = FastAPI(), UserManager(Users())
    backend = AuthenticationBackend[User, uuid.UUID](
        name="redis",
        transport=CookieTransport(**options),
        get_strategy=lambda: RedisStrategy(client, lifetime_seconds=3600),
    )
    users = FastAPIUsers[User, uuid.UUID](lambda: manager, [backend])
    app.include_router(users.get_auth_router(backend))
    current_user = users.current_user()

    @app.post("/register")
    async def register(form: dict[str, str]) -> dict[str, str]:
        hashed_password = manager.password_helper.hash(form["password"])
        user = await manager.user_db.create({"email": form["email"], "hashed_password": hashed_password})
        return {"user_id": str(user.id)}

    @app.post("/me")
    async def me(user: User = Depends(current_user)) -> dict[str, str]:  # noqa: B008
        return {"email": user.email}

    return app
