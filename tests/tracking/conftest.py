"""A real sqlite store, shared by a test session."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from deepseek_exp.config import TrackingConfig
from tests.tracking.tracking_parts import make_config


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    return make_config(f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db")


@pytest.fixture(scope="session")
def client(store: TrackingConfig) -> MlflowClient:
    return MlflowClient(store.uri)


@pytest.fixture
def get_run(client: MlflowClient) -> Callable[[str], Run]:
    return client.get_run
