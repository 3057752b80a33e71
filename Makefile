# What one types while working on this project; CONTRIBUTING.md says when.
.PHONY: install lint types test-fast test bench

# The directories that hold what a video and a loss are made of: chunks, state, network, noise levels, samplers, weights, data.
FAST = tests/flow tests/models tests/sampling tests/weights tests/data tests/ops/test_reference.py tests/ops/test_dispatch.py \
	tests/test_architecture.py tests/test_chunks.py tests/test_config.py tests/test_docs.py tests/test_tensors.py

install:
	pip install -c constraints.txt -e '.[test]'

lint:
	ruff check .
	ruff format --check .

types:
	mypy

test-fast:
	pytest -n 2 --dist worksteal --ignore tests/sampling/test_ltx2.py $(FAST)

test:
	pytest -n 2 --dist worksteal
	pytest tests/serving/test_page.py tests/evaluation/test_page.py

bench:
	python inference_video_scripts/benchmark.py --num_frames 961 --kernels --profile
