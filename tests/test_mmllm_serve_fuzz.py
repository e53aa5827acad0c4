"""Requests that a machine makes up from the published schema, valid and not: none is answered by a 5xx, all as the schema says."""

from collections.abc import Iterator

import pytest
import schemathesis
import serving
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance
from serving import Served

from mmllm.serve.settings import Settings

CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)
EVERY = [("/v1/chat/completions", "POST"), ("/v1/images/generations", "POST"), ("/v1/images/edits", "POST"),
         ("/v1/mmllm/tokens", "POST"), ("/v1/models", "GET"),
         ("/v1/models/{model}", "GET"), ("/v1/mmllm/pictures/{name}", "GET"), ("/health", "GET"), ("/metrics", "GET")]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    engine = serving.drawer(tmp_path_factory.mktemp("fuzz") / "model")
    with serving.serving(engine, Settings(edits=True, max_text=8, max_n=2)) as found:
        yield found


def attack(served: Served, path: str, method: str, examples: int) -> None:
    operation = schemathesis.openapi.from_url(f"{served.url}/openapi.json")[path][method]
    modes = [GenerationMode.POSITIVE] if method == "GET" else list(GenerationMode)  # without a body nothing is invalid
    for mode in modes:
        @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=operation.as_strategy(generation_mode=mode))
        def send(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=list(CHECKS), timeout=30)

        send()


@pytest.mark.parametrize(("path", "method"), EVERY)
def test_no_request_from_the_schema_breaks_the_server(served: Served, path: str, method: str) -> None:
    attack(served, path, method, 5)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "method"), EVERY)
def test_no_request_of_many_from_the_schema_breaks_the_server(served: Served, path: str, method: str) -> None:
    attack(served, path, method, 1_000)


def test_the_schema_names_every_path(served: Served) -> None:
    published = schemathesis.openapi.from_url(f"{served.url}/openapi.json").raw_schema["paths"]
    assert {(path, method.upper()) for path, methods in published.items() for method in methods} >= set(EVERY)
