# make demo   trains the chest X-ray model on small demo data and shows what changed: about 5 minutes on 2 cores
# make demo-brain   the same for brain studies: pretrains, classifies, judges; about 3 minutes
# make demo-em   the same for electron microscopy: trains, segments a volume never seen; about 4 minutes
# make demo-leaf   the same for photographs of leaves: pretrains, classifies, judges; about 4 minutes
# make test   every test
# Each makes .venv first when it is missing.

PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/installed

.PHONY: demo demo-brain demo-em demo-leaf test setup lint bench clean

demo: setup
	$(BIN)/python longitudinal_MIM_training.py -p demo -n demo -c auto
	$(BIN)/python infer_longitudinal.py --checkpoint runs/demo/longitudinal_mim_best.pt \
		--data data/demo/longitudinal/pairs --split test --baseline --output predictions/demo

demo-brain: setup
	$(BIN)/python prepare_data.py demo studies
	$(BIN)/python train_pretrain.py --method jepa -p brain_demo -n brain_demo -c auto
	$(BIN)/python train_finetune.py --task mil -p brain_demo -n findings_demo -c auto \
		--init runs/brain_demo/jepa_last.pt
	$(BIN)/python evaluate.py --checkpoint runs/findings_demo/mil_best.pt --output predictions/findings_demo

demo-em: setup
	$(BIN)/python prepare_data.py demo em
	$(BIN)/python train_vista3d.py -p em_demo -n em_demo -c auto
	$(BIN)/python infer_vista3d.py --checkpoint runs/em_demo/vista3d_best.pt \
		--input data/demo/em/snemi3d/AC3_inputs.h5 --output predictions/em_demo.h5 --patch-size 40 160 160

demo-leaf: setup
	$(BIN)/python prepare_data.py demo leaves
	$(BIN)/python train_pretrain.py --method simclr -p leaf_demo -n leaf_demo -c auto
	$(BIN)/python train_finetune.py --task hvit -p leaf_demo -n leaf_classes_demo -c auto \
		--init runs/leaf_demo/simclr_best.pt
	$(BIN)/python evaluate.py --checkpoint runs/leaf_classes_demo/hvit_best.pt --tta \
		--output predictions/leaf_classes_demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: setup
	$(BIN)/ruff check .

bench: setup
	for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

setup: $(SETUP)

$(SETUP): requirements.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv
