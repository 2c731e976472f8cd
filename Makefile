# make demo   all five systems in short, one after the other, and where their pictures are; about 8 minutes
# make demo-longitudinal   chest X-rays: trains, shows what changed in held-out pairs, measures; about 5 minutes
# make demo-brain   brain studies: pretrains, classifies, judges; about 3 minutes
# make demo-em   electron microscopy: trains, segments a volume never seen; about 4 minutes
# make demo-leaf   photographs of leaves: pretrains, classifies, judges; about 3 minutes
# make demo-spine   spine MRI: trains the stages of the cascade, runs it on patients never seen; about 6 minutes
# make test   every test
# Each makes .venv first when it is missing, and goes on where it was interrupted.

PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/installed

DEMOS := longitudinal brain em leaf spine
RUNS := runs
OUT := predictions
BASELINE := --baseline
SPINE_RUNS := runs/spine_demo
STAGES := anatomy location_view sequence cord
PAINTED := painted_lesions
# What make demo sets: fewer epochs than the presets, smaller images, fewer stages, and folders of its own.
SHORT := RUNS_DIR=runs/short IMG_SIZE=64 MASK_PATCH_SIZE=16 LONGITUDINAL_MIM_EPOCHS=4 JEPA_EPOCHS=5 MIL_EPOCHS=5 \
	VISTA_EPOCHS=1 VISTA_CROPS_PER_EPOCH=160 VISTA_PATCH_SIZE=[24,48,48] SIMCLR_EPOCHS=2 HVIT_EPOCHS=4 SPINE_EPOCHS=1
PICTURES := demo/*_overlay.png findings_demo/attention/*/*.png em_demo.h5.png leaf_classes_demo/mistakes.png \
	leaf_classes_demo/confusion.png spine_demo/series/*/*/*sagittal*.png

.PHONY: demo $(DEMOS:%=demo-%) test setup lint bench clean

demo: setup
	@set -e; for name in $(DEMOS); do echo "== demo-$$name, one of $(words $(DEMOS)): $(DEMOS)"; \
		$(MAKE) --no-print-directory demo-$$name RUNS=runs/short OUT=predictions/short \
		SPINE_RUNS=runs/short STAGES="location_view cord" PAINTED= BASELINE= SET="--set $(SHORT)" MASKS=SPINE_EPOCHS=2; done
	@echo "Pictures, and more beside them:"
	@for place in $(PICTURES); do ls predictions/short/$$place | head -n 2; done
	@ls runs/short/*/loss_curves.png

demo-longitudinal: setup
	$(BIN)/python prepare_data.py demo longitudinal
	$(BIN)/python longitudinal_MIM_training.py -p demo -n demo -c auto $(SET)
	$(BIN)/python infer_longitudinal.py --checkpoint $(RUNS)/demo/longitudinal_mim_best.pt \
		--data data/demo/longitudinal/pairs --split test $(BASELINE) --output $(OUT)/demo

demo-brain: setup
	$(BIN)/python prepare_data.py demo studies
	$(BIN)/python train_pretrain.py --method jepa -p brain_demo -n brain_demo -c auto $(SET)
	$(BIN)/python train_finetune.py --task mil -p brain_demo -n findings_demo -c auto \
		--init $(RUNS)/brain_demo/jepa_last.pt $(SET)
	$(BIN)/python evaluate.py --checkpoint $(RUNS)/findings_demo/mil_best.pt --output $(OUT)/findings_demo

demo-em: setup
	$(BIN)/python prepare_data.py demo em
	$(BIN)/python train_vista3d.py -p em_demo -n em_demo -c auto $(SET)
	$(BIN)/python infer_vista3d.py --checkpoint $(RUNS)/em_demo/vista3d_best.pt \
		--input data/demo/em/snemi3d/AC3_inputs.h5 --output $(OUT)/em_demo.h5 --patch-size 40 160 160

demo-leaf: setup
	$(BIN)/python prepare_data.py demo leaves
	$(BIN)/python train_pretrain.py --method simclr -p leaf_demo -n leaf_demo -c auto $(SET)
	$(BIN)/python train_finetune.py --task hvit -p leaf_demo -n leaf_classes_demo -c auto \
		--init $(RUNS)/leaf_demo/simclr_best.pt $(SET)
	$(BIN)/python evaluate.py --checkpoint $(RUNS)/leaf_classes_demo/hvit_best.pt --tta \
		--output $(OUT)/leaf_classes_demo

# The runs are named after the stages of the cascade, so that their folder is what --weights asks for.
demo-spine: setup
	$(BIN)/python prepare_data.py demo spine
	set -e; for stage in $(STAGES); do \
		$(BIN)/python train_finetune.py --task classify -p spine_demo -n $$stage -c auto \
			$(or $(SET),--set) SPINE_DEMO_TABLE=$$stage; done
	$(BIN)/python train_finetune.py --task segment -p spine_demo_masks -n cord_mask -c auto $(SET) $(MASKS)
	set -e; for stage in $(PAINTED); do \
		$(BIN)/python train_finetune.py --task segment -p spine_demo_masks -n $$stage -c auto \
			--init $(SPINE_RUNS)/cord_mask/segment_best.pt \
			$(or $(SET),--set) $(MASKS) SPINE_LESIONS=1.0 SPINE_LESIONS_IN_VALIDATION=True; done
	$(BIN)/python train_finetune.py --task segment -p spine_demo_lesions -n lesion_mask -c auto \
		--init $(SPINE_RUNS)/$(or $(PAINTED),cord_mask)/segment_best.pt $(SET) $(MASKS)
	$(BIN)/python infer_cascade.py --input data/demo/spine --split test --weights $(SPINE_RUNS) \
		--keep "location_view=*" --output $(OUT)/spine_demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

lint: setup
	$(BIN)/ruff check .

bench: setup
	for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

setup: $(SETUP)

$(SETUP): requirements.txt requirements-dev.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and \
		'Python 3.11 or newer is needed; if there is one: make PYTHON=python3.12 ...')"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv
