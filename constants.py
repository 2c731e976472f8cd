"""Every hyperparameter, one numbered section per subject; the scripts read them as ``C.NAME``.

    1 Run      2 Optimisation      3 Schedules      4 Demo data
    Longitudinal: 5 data and training   6 model   7 losses   8 inside the losses   9 augmentation   10 pairs
    11 Longitudinal pairs from CT
    Brain studies: 12 cache and splits   13 what a network sees   14 token transformer
    15 JEPA   16 JEPA's schedule and predictor   17 JEPA's masks
    Study classification (MIL): 18 training   19 network and loss
    Electron microscopy (Vista): 20 data   21 augmentation   22 network   23 training   24 losses, instances
    Photographs: 25 data and network   26 SimCLR   27 its views   28 HViT   29 its loss, augmentation
    Spine MRI: 30 data   31 network and losses   32 training   33 augmentation and synthetic lesions

Literals only.  For one run, ``-p PRESET`` overrides the values here and ``--set NAME=VALUE`` overrides both;
the values used are written to ``training_params.json``.
"""

# ------------------------------------------------------------------- 1 Run
SEED = 0
RUNS_DIR = "runs"                # each run is a folder here
TRACKERS = ["tensorboard"]       # any of "tensorboard" | "wandb" (if installed); [] for none
NUM_WORKERS = 2                  # data-loading processes per rank
ON_BAD_FILE = "stop"             # "stop" | "skip": the next readable case stands in, and the file is listed
PRECISION = "bf16"               # "fp32" | "bf16" | "fp16" (with gradient scaling)
CHANNELS_LAST = True             # memory format of convolutions
COMPILE = False                  # torch.compile of the network
ACTIVATION_CHECKPOINTING = False  # less memory, more time
STRATEGY = "ddp"                 # torchrun: "ddp" | "zero2" shards gradients, moments | "fsdp" weights too
CHECKPOINT_MINUTES = 10.0        # between two writes of *_last.pt inside an epoch
SAVE_EVERY_EPOCHS = 1            # keep *_epoch_N.pt of every n-th epoch; 0: only the best
KEEP_TOP_K = 3                   # keep *_epoch_N.pt of the k epochs with the lowest validation loss
SAMPLES_PER_EPOCH = 4            # validation cases drawn in samples/epoch_N.png; 0: none
LOG_EVERY_BATCHES = 10           # between two printed lines

# ---------------------------------------------------------- 2 Optimisation
OPTIMIZER = "adamw"              # "sgd" | "adam" | "adamw"
ADAM_BETAS = [0.9, 0.999]        # adam, adamw
MOMENTUM = 0.9                   # sgd
NO_DECAY_NORM_BIAS = True        # no weight decay on biases and normalisation layers
GRAD_CLIP_NORM = 1.0             # L2 norm of the whole gradient; 0: no clipping
USE_EMA = True                   # validate with, and save, a moving average of the weights
EMA_DECAY = 0.999                # per optimizer step
EMA_WARMUP = True                # decay min(EMA_DECAY, (1 + step) / (10 + step))

# ------------------------------------------------------------- 3 Schedules
SCHEDULE = "onecycle"            # "onecycle" | "cosine" | "step" | "cosine_restarts"
ONECYCLE_PCT_START = 0.15        # fraction of the steps spent rising
ONECYCLE_DIV_FACTOR = 25.0       # peak / first learning rate
ONECYCLE_FINAL_DIV_FACTOR = 1e4  # first / last learning rate
WARMUP_STEPS = 0.1               # cosine: steps, or a fraction of all steps when below 1
NUM_CYCLES = 0.5                 # cosine: 0.5 goes down once
IPE_SCALE = 1.0                  # cosine: schedule length / training length (I-JEPA)
START_LR = 0.0                   # cosine: first rate of the warm-up
FINAL_LR = 0.0                   # cosine, cosine_restarts: lowest rate
STEP_SIZE = 1                    # step: length of a stair
STEP_UNIT = "epoch"              # step: "epoch" | "step"
STEP_GAMMA = 0.5                 # step: factor per stair
RESTART_T0 = 1                   # cosine_restarts: length of the first cycle
RESTART_T0_UNIT = "epoch"        # cosine_restarts: "epoch" | "step"
RESTART_T_MULT = 2               # cosine_restarts: growth of the cycles

# ------------------------------------------------------------- 4 Demo data
DEMO_DIR = "data/demo"           # made on first use
DEMO_STUDIES = 12                # invented brain studies, two thirds MRI and one third CT
DEMO_EM_SIZE = [40, 160]         # sections and pixels per side of the invented EM volumes
DEMO_LEAVES = 64                 # invented photographs of each of five classes of leaves
DEMO_SPINE = [24, 160]           # invented patients with MRI of the spine; pixels per side of a slice
DEMO_SIZE = 128                  # pixels per side of the pairs, and about the width of the X-rays
DEMO_PATIENTS = 40               # invented ones
DEMO_PAIRS_PER_PATIENT = 10      # shared out among the two images of a patient; odd numbers are rounded up
DEMO_SETTINGS = {                # replace PAIR_*: phantoms have little texture, so appearance must differ
    # more for a registered subtraction to do as badly as on patients; nodules are hardly seen at 128 pixels
    "exposure": 0.8, "local_contrast": 0.6, "breath": 0.05, "bend": 0.006,
    "findings": {"nodules": 0.1, "consolidation": 0.4, "effusion": 0.35, "pneumothorax": 0.15,
                 "cardiomegaly": 0.15}}

# ---------------------------------- 5 Longitudinal: data and training
IMG_SIZE = 512                   # pixels, divisible by 32
BATCH_SIZE = 4                   # image pairs per rank and micro-batch
UPDATE_EVERY_BATCHES = 12        # micro-batches per optimizer step
LONGITUDINAL_MIM_EPOCHS = 10     # passes over the training pairs
MAX_LR = 6e-4                    # peak learning rate
WEIGHT_DECAY = 1e-2              # of sgd, adam, adamw
VAL_FRACTION = 0.15              # of the patients
TEST_FRACTION = 0.15             # of the patients; never seen by training
SPLIT_CSV = ""                   # columns patient or case, split (train|val|test); "": by hash of patient
CHANGE_THRESHOLD = 0.05          # |difference| above which a pixel counts as changed

# ------------------------------------------------- 6 Longitudinal: model
EFFICIENTNET = "b7"              # "b0" .. "b7"
VIT = "base"                     # "tiny" (192) | "small" (384) | "base" (768)
DECODER_CHANNELS = [256, 192, 128, 64, 32]  # widths at strides 32, 16, 8, 4, 2; multiples of 8
EFFICIENTNET_WEIGHTS = ""        # torchvision's or timm's file, or Hugging Face folder; "": random, or --init
VIT_WEIGHTS = ""                 # Hugging Face folder of a ViT or DINOv2 (RAD-DINO); "": random
ANTISYMMETRIC = False            # swapping the images negates the map exactly
DROPOUT = 0.1                    # of whole channels of the deepest features
MASK_PATCH_SIZE = 128            # pixels, side of a hidden patch
MASK_MODE = "single"             # "single": one patch of one image | "random": each patch by itself
MASK_PROB_LOW = 0.05             # probability of hiding at the start and the end of the schedule
MASK_PROB_HIGH = 0.7             # and in its middle

# ------------------------------------------------ 7 Longitudinal: losses
USE_L1 = True
USE_L2 = True
USE_SSIM = False
USE_PERC_STYLE = False           # needs VGG_WEIGHTS
USE_FOURIER = False
USE_GAN = False
USE_DICE = True                  # soft Dice of the changed pixels, each sign
USE_CHANGE_WEIGHT = True         # L1 and L2 count changed pixels more
LAMBDA_L1_ALL = 1.0
LAMBDA_L1_MASKED = 1.0           # L1 on hidden patches
LAMBDA_L2 = 1.0
LAMBDA_SSIM = 1.5
LAMBDA_P = 2.0                   # perceptual
LAMBDA_S = 2.0                   # style
LAMBDA_FOURIER = 0.05
LAMBDA_GAN = 0.5
LAMBDA_DICE = 0.1

# ------------------------------------------ 8 Longitudinal: inside the losses
CHANGE_WEIGHT = 10.0             # weight of a changed pixel in L1 and L2; an unchanged one weighs 1
DICE_TEMPERATURE = 0.05          # width of the soft threshold of the Dice term, in units of the map
VGG_WEIGHTS = ""                 # file of torchvision's vgg19_bn weights (vgg19_bn-c79401a0.pth)
GAN_START_EPOCH = 3              # first epoch with the discriminator
GAN_LR = 2e-4                    # of the discriminator
GAN_WEIGHT_DECAY = 0.0           # of the discriminator
GAN_BETAS = [0.5, 0.999]         # of the discriminator's AdamW (Radford et al. 2016, arXiv:1511.06434)

# --------------------------- 9 Longitudinal: augmentation, in training only
AUG_FLIP = 0.5                   # probability of mirroring left and right
AUG_ROTATION = 5.0               # degrees: limit of a rotation of both images and the map
AUG_SHIFT = 0.03                 # of the side: limit of a shift of both images and the map
AUG_SCALE = 0.05                 # limit of a change of size of both images and the map
AUG_CLAHE = 0.3                  # probability of local histogram equalisation
AUG_SHARPNESS = 0.3              # probability of sharpening or blurring
AUG_EXPOSURE = 0.2               # limit of |log(gamma)| and of -log(gain), drawn for each image
AUG_NOISE = 0.01                 # of the [0, 1] image: limit of the noise's standard deviation

# --------------- 10 Longitudinal: pairs made by prepare_data.py pairs and demo
PAIR_SIZE = 256                  # pixels per side of the pairs
PAIR_PER_IMAGE = 8               # pairs made from one X-ray or CT volume
PAIR_UNCHANGED = 0.2             # share of pairs in which no finding differs
PAIR_FINDINGS = {                # probability of each kind in a pair
    "nodules": 0.3, "consolidation": 0.35, "effusion": 0.25, "pneumothorax": 0.15, "cardiomegaly": 0.15}
PAIR_DEVICES = 0.5               # probability of tubes, lines or leads in each image
PAIR_ROTATION = 5.0              # degrees: limit of each image's rotation; most are far smaller
PAIR_SHIFT = 0.03                # parts of the longer side: limit of each image's shift
PAIR_SCALE = 0.05                # limit of |log(magnification)| of each image
PAIR_BREATH = 0.035              # parts of the longer side: limit of the diaphragm's move
PAIR_BEND = 0.004                # parts of the longer side: amplitude of the smooth warp of each image
PAIR_EXPOSURE = 0.25             # limit of |log(gamma)|; also scales uneven brightness and cut highlights
PAIR_LOCAL_CONTRAST = 0.4        # limit of the gain of details
PAIR_NOISE = 0.015               # of the [0, 1] image: limit of the standard deviation of the grain
PAIR_BLUR = 0.7                  # limit of sigma in pixels of a 256-pixel image

# --------------------- 11 Longitudinal: pairs from CT (prepare_data.py pairs --ct)
CT_SPACING_MM = 2.5              # isotropic voxels that volumes are resampled to
CT_MARGIN_MM = 25.0              # around the lungs in the projected image
CT_MAX_ANGLE = 17.5              # degrees: limit of the rotation about each axis, at each time
CT_MAX_ANGLE_SUM = 37.5          # degrees: limit of the sum of |angles| over the three axes
CT_ANGLE_POWER = 1.75            # angle = u^power * sign * limit, u uniform in [0, 1]
CT_BOTH_PROBABILITY = 0.35       # of a finding to be there both times; else prior or current, evenly
CT_CONSOLIDATION_CLUSTERS = [    # fewest, most balls; least, largest radius over the lung's height
    [80, 400, 0.02, 0.05], [25, 70, 0.02, 0.09], [1, 3, 0.08, 0.25], [1, 2, 0.12, 0.4]]
CT_CONSOLIDATION_HU = [          # scale, shift (HU)
    [150, -30], [300, -300], [150, -300], [200, -150], [520, -400]]
CT_NODULE_RADIUS_MM = [4.0, 15.0]         # least, largest
CT_EFFUSION_HEIGHT = [0.06, 0.45]         # least, largest level over the lung's height
CT_PNEUMOTHORAX_RIM_MM = [10.0, 45.0]     # least, largest width of the air, at the apex
CT_CARDIOMEGALY_GROWTH_MM = [8.0, 30.0]   # least, largest, towards the left; 0.4 of it towards the right

# ------------------------------- 12 Brain studies: cache and splits
STUDY_SPACING_MM = [4.0, 1.0]    # of the cached grid: along the slice axis, in the plane
STUDY_MRI_PERCENTILES = [0.5, 99.5]  # MRI values are clipped to these, then stretched to 0..255
STUDY_MRI_BACKGROUND = 10.0      # percentile of an MRI up to which a voxel is background
STUDY_CT_BACKGROUND_HU = -500.0  # CT values up to this are background
STUDY_VAL_FRACTION = 0.15        # of the studies
STUDY_TEST_FRACTION = 0.15       # of the studies; never seen by training
STUDY_SPLIT_CSV = ""             # columns study, split (train|val|test); "": by hash of the patient's name
STUDY_PATIENTS = ""              # CSV with study_id, patient: their studies stay together; "": one each
STUDY_LABELS = ""                # CSV with study_id and label columns; "": the demo's, or none

# ---------------------------- 13 Brain studies: what a network sees
STUDY_REMOVE_BACKGROUND = True   # leave out tokens that hold a background voxel
STUDY_WINDOW_PROBABILITIES = [0.7, 0.15, 0.15]   # of a CT's brain, blood and bone window, where one is drawn
STUDY_MAX_CROP = [20, 20, 20]    # tokens: largest random crop, D, H, W
STUDY_SPATIAL_AUGMENT = True     # flips and swap of the two axes in the plane, each with probability 0.5
STUDY_GAMMA = 0.2                # limit of |log(gamma)|; this and the next three: training only, 0 is off
STUDY_BRIGHTNESS = 0.1           # limit of |shift| of the [0, 1] image
STUDY_CONTRAST = 0.2             # limit of |change| of the contrast about the mean
STUDY_NOISE = 0.05               # limit of the standard deviation of noise on the normalised image

# ------------------------------ 14 Brain studies: token transformer
STUDY_VIT = "base"               # "tiny" | "small" | "base" | "large" | "huge" | "custom": by the next four
STUDY_VIT_DIM = 768              # custom: width
STUDY_VIT_DEPTH = 12             # custom: blocks
STUDY_VIT_HEADS = 12             # custom: attention heads
STUDY_VIT_MLP_RATIO = 4.0        # custom: hidden width of the MLPs / width
STUDY_POSITION = "concat"        # "concat": 30 of the dimensions are the 3D sinusoids | "add"
STUDY_ATTENTION = "auto"         # "auto" | "sequences" | "buckets" | "block_mask" | "nested" | "varlen"
STUDY_DROPOUT = 0.0              # of attention and MLPs
STUDY_DROP_PATH = 0.0            # of whole residual branches, at the last block; less before

# --------------------- 15 JEPA (train_pretrain.py --method jepa): training
JEPA_EPOCHS = 100                # passes over the training images
JEPA_BATCH_SIZE = 8              # images per rank and micro-batch
JEPA_UPDATE_EVERY_BATCHES = 1    # micro-batches per optimizer step
JEPA_STUDY_SAMPLER = False       # batches of whole studies with all their series and windows
JEPA_RANDOM_CROP = True          # train on random crops with foreground in them
JEPA_LR = 3.75e-4                # peak learning rate
JEPA_SCALE_LR = False            # multiply JEPA_LR and its start and end by effective batch / 256
JEPA_WEIGHT_DECAY = 0.05         # of sgd, adam, adamw
JEPA_NO_DECAY_NORM_BIAS = False  # as NO_DECAY_NORM_BIAS, which the others use
JEPA_TEACHER_MOMENTUM = [0.994, 1.0]  # of the teacher's average: first, last; linear
JEPA_MONITOR = "epoch"           # the metric of jepa_best.pt and KEEP_TOP_K; "epoch", "max": the newest,
JEPA_MONITOR_MODE = "max"        # for val/loss, "min", falls when the features collapse, too
JEPA_PROBE_EVERY = 5             # epochs between probes of frozen features on labelled studies; 0: never

# ------------------------------- 16 JEPA: schedule and predictor
JEPA_SCHEDULE = "cosine"         # as SCHEDULE
JEPA_WARMUP_STEPS = 0.1          # cosine: steps, or a fraction of all steps when below 1
JEPA_START_LR = 1e-4             # cosine: first rate of the warm-up
JEPA_FINAL_LR = 1e-6             # cosine, cosine_restarts: lowest rate
JEPA_IPE_SCALE = 1.25            # length of the rate's and the momentum's schedule / length of the training
JEPA_PREDICTOR_DIM = 512         # width
JEPA_PREDICTOR_DEPTH = 4         # blocks
JEPA_PREDICTOR_HEADS = 8         # attention heads

# --------------------------------------------------------- 17 JEPA: masks
JEPA_TARGET_SHARE = {"mri": 0.70, "ct": 0.75}      # of the foreground that the block of targets covers
JEPA_CONTEXT_CEILING = {"mri": 0.25, "ct": 0.20}   # of the foreground; slabs above it are dropped
JEPA_CONTEXT_RANGE = [0.05, 0.5]   # of the foreground; other masks are drawn again
JEPA_ASPECT = [0.3, 3.0]         # height / width of the block, drawn between them
JEPA_DROP_RATE = 0.1             # share of context tokens that become targets

# --------------------- 18 MIL (train_finetune.py --task mil): training
MIL_EPOCHS = 50                  # passes over the training studies
MIL_BATCH_SIZE = 16              # images (series, CT windows) per rank and micro-batch, in whole studies
MIL_UPDATE_EVERY_BATCHES = 1     # micro-batches per optimizer step
MIL_LR = 5e-4                    # peak learning rate of the pooler
MIL_BACKBONE_LR_SCALE = 0.1      # rate of the backbone / MIL_LR, where it is trained
MIL_WEIGHT_DECAY = 0.05          # of sgd, adam, adamw
MIL_SCHEDULE = "cosine"          # as SCHEDULE
MIL_RANDOM_CROP = False          # train on random crops
MIL_PATCH_DROP = 0.1             # share of tokens left out in training
MIL_MONITOR = "val/auroc"        # the metric of mil_best.pt and KEEP_TOP_K
MIL_MONITOR_MODE = "max"         # "min" | "max"

# ------------------------------------------- 19 MIL: network and loss
MIL_FREEZE_BACKBONE = True       # train the pooler alone
MIL_POOLER = "classify_then_aggregate"  # | "aggregate_then_classify" | "average"
MIL_ATTENTION_DIM = 512          # hidden width of the gated attention
MIL_ATTENTION_HEADS = 1          # aggregate_then_classify: 1, or 0 for one per label
MIL_USE_NORM = False             # LayerNorm of the tokens before the pooler
MIL_MLP_DIMS = [384]             # hidden widths of the classifier; [] for a linear one
MIL_LOSS = "bce"                 # "bce": labels 0, 1 | "ce": classes | "mse" | "mae" | "rmse": numbers
MIL_CLASS_WEIGHTS = []           # bce: of each label's positives, ce: of each class; []: by MIL_BALANCE
MIL_BALANCE = True               # weights from the counts in training (bce, ce)

# ------------------- 20 Electron microscopy (train_vista3d.py): data
VISTA_DATASETS = ["snemi3d"]     # folders of --data: snemi3d, cremi3d, mitoem2; a volumes.csv counts instead
VISTA_DATASET_WEIGHTS = {        # how often a crop comes from it, relative to the others
    "snemi3d": 1.0, "cremi3d": 1.0, "mitoem2": 1.5}
VISTA_SLICES = False             # train on single sections (Vista2D), not on 3D patches
VISTA_PATCH_SIZE = [32, 128, 128]  # voxels, D, H, W of a crop; slices use the last two
VISTA_CROPS_PER_EPOCH = 400      # random crops of an epoch, over all ranks
VISTA_VAL_CROPS = 40             # most windows of the validation sections, evenly chosen
VISTA_VAL_FRACTION = 0.15        # of the sections of a volume that has no split of its own
VISTA_TEST_FRACTION = 0.0        # the same; never seen by training
VISTA_GAP = 8                    # sections between two splits of one volume that nobody sees
VISTA_BOUNDARY = True            # voxels where two instances touch are of the class boundary
VISTA_CACHE_RATE = 0.0           # share of the volumes kept in memory, 0 to 1; the rest is read as needed

# ----------------------- 21 Electron microscopy: augmentation, in training only
VISTA_AUG_FLIP = 0.5             # probability of mirroring, each axis
VISTA_AUG_ROTATE = 0.5           # probability of a rotation in the plane
VISTA_AUG_ANGLE = 15.0           # degrees: limit of that rotation beyond multiples of 90
VISTA_AUG_ELASTIC = 0.5          # probability of an elastic deformation in the plane
VISTA_AUG_NOISE = 0.3            # probability of Gaussian noise
VISTA_AUG_NOISE_STD = 0.1        # its largest standard deviation, of the [0, 1] image
VISTA_AUG_GAMMA = 0.3            # probability of another gamma
VISTA_AUG_GAMMA_RANGE = [0.7, 1.3]  # least and largest exponent
VISTA_AUG_CONTRAST = 0.3         # probability of another contrast and brightness
VISTA_AUG_MISSING = 0.1          # probability that sections are missing
VISTA_AUG_SHIFT = 0.1            # probability that sections slip against their neighbours
VISTA_AUG_DEFECTS = 0.3          # probability of folds, stains, blur or jumps of brightness

# ------------------------------------- 22 Electron microscopy: network
VISTA_ENCODER = "vista3d"        # "vista3d": VISTA3D's image encoder | "segresnet" | "token_vit": the
# transformer of section 14 with a decoder, for volumes; JEPA's weights start it
VISTA_FEATURES = 48              # width at full resolution; doubles with each level
VISTA_HEAD_WIDTH = 64            # channels inside the two heads
VISTA_NUM_CLASSES = 16           # of the semantic head; five are in use, the others are headroom
VISTA_EMBEDDING = 16             # dimensions of the instance head
VISTA_COORDINATES = 16.0         # voxels to one unit of the place that is added to embeddings; 0: none is

# ------------------------------------ 23 Electron microscopy: training
VISTA_EPOCHS = 100               # of VISTA_CROPS_PER_EPOCH crops
VISTA_BATCH_SIZE = 4             # crops per rank and micro-batch
VISTA_UPDATE_EVERY_BATCHES = 1   # micro-batches per optimizer step
VISTA_LR = 1e-3                  # peak learning rate
VISTA_WEIGHT_DECAY = 1e-4        # of sgd, adam, adamw
VISTA_SCHEDULE = "cosine"        # as SCHEDULE
VISTA_WARMUP_STEPS = 0.0         # cosine: steps, or a fraction of all steps when below 1
VISTA_FINAL_LR = 1e-6            # cosine, cosine_restarts: lowest rate
VISTA_VAL_EVERY = 1              # epochs between validations; the first and last epoch have one always
VISTA_PATIENCE = 0               # validations without a better one that end the run; 0: never
VISTA_MONITOR = "val/loss"       # the metric of vista3d_best.pt, KEEP_TOP_K and VISTA_PATIENCE
VISTA_MONITOR_MODE = "min"       # "min" | "max"

# ------------------------ 24 Electron microscopy: losses and instances
VISTA_CE_WEIGHT = 0.5            # of the cross-entropy
VISTA_DICE_WEIGHT = 0.5          # of the soft Dice loss; 0: off
VISTA_CLASS_WEIGHTS = []         # of the cross-entropy, one for each of VISTA_NUM_CLASSES; []: all 1
VISTA_IGNORE_INDEX = -100        # class that the semantic loss leaves out; -100: only what is not annotated
VISTA_WEIGHT_PULL = 1.0          # embeddings towards their instance's mean
VISTA_WEIGHT_PUSH = 1.0          # means of instances away from each other
VISTA_WEIGHT_NORM = 1e-3         # means towards the origin
VISTA_DELTA_V = 0.5              # distance from the mean up to which nothing pulls
VISTA_DELTA_D = 1.5              # half the distance of two means from which nothing pushes
VISTA_WEIGHT_EDGE = 10.0         # weight of voxels at the border of an instance; 1: no difference
VISTA_WEIGHT_BONE = 10.0         # weight of an instance's innermost voxels, falling outwards; 1: off
VISTA_PER_CLASS = True           # instances keep away from those of their own class alone
VISTA_BANDWIDTH = 0.5            # validation: radius of a cluster of embeddings
VISTA_MIN_INSTANCE = 50          # validation: voxels of the smallest instance
VISTA_GROW_NM = 20.0             # validation: how far instances grow into the class boundary

# --------------------- 25 Photographs (SimCLR, HViT): data and network
HVIT_IMG_SIZE = 256              # pixels per side of what the network sees; any size
HVIT_FIT = "crop"                # "crop": a square of the photograph | "squash": all of it, out of shape
HVIT_CACHE_RATE = 0.0            # share of the photographs kept in memory, decoded and resized, 0 to 1
HVIT_VAL_FRACTION = 0.15         # of the photographs, in whole groups of copies, alike in each class
HVIT_TEST_FRACTION = 0.15        # the same; never seen by training
HVIT_SPLIT_CSV = ""              # columns path, split (train|val|test), as a run's splits.csv; "": by SEED
HVIT_HASH_DISTANCE = 8           # bits of 63 up to which two photographs are copies; -1: by names alone
HVIT_MODEL = "hvit_small"        # "hvit_tiny" | "hvit_small" | "hvit_base" | "resnet18" | "resnet34"
# | "resnet50" | "swin_t" | "efficientnet_b0" .. "efficientnet_b7"
HVIT_WEIGHTS = ""                # torchvision's or Hugging Face's for one of those; "": random, or --init
HVIT_DROP_PATH = 0.2             # of whole residual branches, at the last block; less before
HVIT_DROPOUT = -1.0              # of swin_t, efficientnet; below 0: the network's own
HVIT_SPECTRAL_CHANNELS = 0       # bands of the <name>_spectral.npy or .tif beside each photograph
HVIT_DFCA = False                # fuse them by cross-attention after each stage; else they are added once
HVIT_DFCA_HEADS = 12             # attention heads of that
HVIT_DFCA_DROPOUT = 0.1          # dropout of that

# ------------------ 26 SimCLR (train_pretrain.py --method simclr): training
SIMCLR_EPOCHS = 100              # passes over the training photographs
SIMCLR_BATCH_SIZE = 64           # photographs per rank and micro-batch; all ranks' are told apart
SIMCLR_UPDATE_EVERY_BATCHES = 1  # micro-batches per optimizer step; adds no negatives
SIMCLR_LR = 3e-4                 # peak learning rate
SIMCLR_WEIGHT_DECAY = 1e-4       # of sgd, adam, adamw
SIMCLR_SCHEDULE = "cosine"       # as SCHEDULE
SIMCLR_WARMUP_STEPS = 0.1        # cosine: steps, or a fraction below 1: 10 of 100 epochs
SIMCLR_FINAL_LR = 0.0            # cosine, cosine_restarts: lowest rate
SIMCLR_TEMPERATURE = 0.07        # of the similarities in the loss
SIMCLR_PROJECTION_DIM = 128      # width of what is compared
SIMCLR_PROBE_EVERY = 10          # epochs between probes of frozen features, where there are classes; 0: never

# ----------------------------------------- 27 SimCLR: views, drawn per image
SIMCLR_CROP_SCALE = [0.2, 1.0]   # area of a crop, of the image
SIMCLR_FLIP = 0.5                # probability of mirroring left and right
SIMCLR_JITTER = 0.8              # probability of the next four together
SIMCLR_BRIGHTNESS = 0.8          # limit of the factor's distance from 1
SIMCLR_CONTRAST = 0.8            # the same
SIMCLR_SATURATION = 0.8          # the same
SIMCLR_HUE = 0.2                 # limit of the turn, of the whole circle
SIMCLR_GRAYSCALE = 0.2           # probability of losing the colours
SIMCLR_BLUR = 0.5                # probability of a Gaussian blur
SIMCLR_BLUR_SIGMA = [0.1, 2.0]   # pixels: least and largest standard deviation of it

# ------------------- 28 HViT (train_finetune.py --task hvit): training
HVIT_EPOCHS = 100                # passes over the training photographs
HVIT_BATCH_SIZE = 32             # photographs per rank and micro-batch
HVIT_UPDATE_EVERY_BATCHES = 1    # micro-batches per optimizer step
HVIT_LR = 1e-4                   # peak learning rate of the head
HVIT_LAYER_DECAY = 1.0           # rate of each of six parts / that of the part above it, the head on top
HVIT_FREEZE_EPOCHS = 0           # first epochs in which the head alone is trained
HVIT_WEIGHT_DECAY = 0.01         # of sgd, adam, adamw
HVIT_SCHEDULE = "cosine"         # as SCHEDULE
HVIT_WARMUP_STEPS = 0.05         # cosine: steps, or a fraction below 1: 5 of 100 epochs
HVIT_FINAL_LR = 0.0              # cosine, cosine_restarts: lowest rate
HVIT_PATIENCE = 15               # epochs without a better HVIT_MONITOR that end the run; 0: never
HVIT_MONITOR = "val/f1_macro"    # the metric of hvit_best.pt, KEEP_TOP_K and HVIT_PATIENCE
HVIT_MONITOR_MODE = "max"        # "min" | "max"

# ----------------------------------- 29 HViT: loss and augmentation
HVIT_LOSS = "combined"           # "ce" | "focal" | "combined": half of each
HVIT_FOCAL_GAMMA = 2.0           # focal, combined: how much less a right and sure answer counts
HVIT_LABEL_SMOOTHING = 0.1       # ce, combined: share of a target spread over all classes
HVIT_BALANCE = "none"            # | "weights": loss by n / (C x count) | "sampler": classes drawn alike
HVIT_SEVERITY = "moderate"       # "light": crop, flip | "moderate": + colours, blur, rotation
# | "aggressive": + RandAugment, Cutout, grid distortion
HVIT_MIXUP_PROB = 0.4            # of a batch
HVIT_MIXUP_ALPHA = 0.8           # its shares are drawn from Beta(alpha, alpha)
HVIT_CUTMIX_PROB = 0.4           # of a batch; with HVIT_MIXUP_PROB at most 1
HVIT_CUTMIX_ALPHA = 1.0          # its areas are drawn from Beta(alpha, alpha)

# ------------- 30 Spine MRI (train_finetune.py --task classify | segment | multitask): data
SPINE_SIZE = 224                 # pixels per side of the square that the network sees
SPINE_FIT = "letterbox"          # "letterbox": shapes stay true, with room around | "squash": all is filled
SPINE_FIELD_MM = 0.0             # letterbox: least mm across the square, for crops; 0: every slice fills it
SPINE_INTENSITY = "slice"        # "slice" | "series": of what the next two are taken
SPINE_PERCENTILES = [0.5, 99.5]  # that become 0 and 1
SPINE_LAYOUT = "auto"            # folders: "auto" | "classes" | "pairs" | "patients" | "radimagenet"
SPINE_AXIS = "stored"            # series are cut into "sagittal" | "coronal" | "axial" slices, or "stored"
SPINE_MASK_WORD = "seg"          # what follows "_" in the names of masks beside images
SPINE_MASK_CLASSES = ["cord"]    # names of the values 1, 2, ... in the masks
SPINE_VAL_FRACTION = 0.15        # of the patients
SPINE_TEST_FRACTION = 0.15       # of the patients; never seen by training
SPINE_SPLIT_CSV = ""             # columns patient, split (train|val|test); "": the list's own, else by hash
SPINE_DEMO_TABLE = "location_view"  # without --data: "anatomy" | "location_view" | "sequence" | "cord"
# | "cord_masks" | "lesion_masks" of the demo
SPINE_CACHE_MB = 256             # of decoded series that each process keeps, the last used

# -------------------------------------- 31 Spine MRI: network and losses
SPINE_ENCODER = "resnet18"       # "resnet18" | "resnet34" | "resnet50" | "plain": a U-Net's own, for masks
SPINE_DEPTH = 4                  # plain: halvings of the slice
SPINE_FEATURES = 16              # width of a U-Net at full resolution; doubles with each level
SPINE_ATTENTION = False          # gates on the U-Net's skip connections
SPINE_XAVIER = False             # first weights after Glorot & Bengio 2010; False: torch's
SPINE_MASK_PRIOR = 0.05          # probability of masks before training (Lin et al. 2017); 0: torch's bias
SPINE_WEIGHTS = ""               # the ResNet's, torchvision's, RadImageNet's, ...; "": random, or --init
SPINE_LOSS = "dice"              # of masks: "dice" | "bce" | "ce" | "combined" | "l1" | "mse" | "smooth_l1"
# | "nll" | "kl" | "bce_logits"; classes have the cross-entropy
SPINE_DICE_WEIGHT = 0.5          # combined: share of "dice"; the rest is "ce"
SPINE_CLASS_WEIGHTS = []         # ce, nll, kl, combined: of background and mask classes; []: all 1
SPINE_TASK_WEIGHTING = "fixed"   # multitask: "fixed" | "uncertainty": learnt (Kendall et al. 2018)
SPINE_TASK_WEIGHTS = [1.0, 1.0]  # multitask: of masks and classes; learnt ones start there
SPINE_THRESHOLD = 0.5            # one mask class: probability from which a pixel is of it
SPINE_FOUND_SHARE = 0.0          # a lesion is found where more than this share of it is; 0: by any pixel

# ------------------------------------------------- 32 Spine MRI: training
SPINE_EPOCHS = 50                # passes over the training slices
SPINE_BATCH_SIZE = 64            # slices per rank and micro-batch
SPINE_UPDATE_EVERY_BATCHES = 1   # micro-batches per optimizer step
SPINE_LR = 1e-3                  # peak learning rate
SPINE_WEIGHT_DECAY = 0.01        # of sgd, adam, adamw
SPINE_SCHEDULE = "cosine"        # as SCHEDULE; a constant rate is "step" with STEP_GAMMA = 1.0
SPINE_WARMUP_STEPS = 0.0         # cosine: steps, or a fraction of all steps when below 1
SPINE_FINAL_LR = 0.0             # cosine, cosine_restarts: lowest rate
SPINE_BALANCE = False            # draw the classes of slices equally often
SPINE_PATIENCE = 0               # epochs without a better SPINE_MONITOR that end the run; 0: never
SPINE_MONITOR = ""               # of <task>_best.pt, KEEP_TOP_K and SPINE_PATIENCE; "": val/dice where there
# are masks, else val/f1_macro
SPINE_MONITOR_MODE = "max"       # "min" | "max"

# ---------------------- 33 Spine MRI: augmentation and synthetic lesions
SPINE_SEVERITY = "light"         # "none" | "light": blur, crop, flip, contrast, noise, rotation
# | "heavy": + gamma, bias field, elastic, grid and optical distortion, holes
SPINE_LESIONS = 0.0              # share of the slices with cord that get lesions; above 0 the network learns
# lesions from masks of the cord, or of cord and lesion
SPINE_LESIONS_IN_VALIDATION = False  # paint them there, too; else the masks must have lesions of their own
SPINE_LESION_COUNT = [1, 3]      # fewest and most ellipses in a slice
SPINE_LESION_AXIS = [5.0, 20.0]  # pixels of a slice of 320: least and largest semi-axis
SPINE_LESION_FLATNESS = [0.6, 1.0]   # least and largest second semi-axis / first
SPINE_LESION_FACTOR = [1.25, 2.25]   # least and largest intensity / median of the cord
SPINE_LESION_CEILING = 0.784     # of the [0, 1] slice: largest intensity, texture apart

# A preset is chosen with -p NAME; it overrides the values above.
PRESETS = {
    "snemi2d": {                 # slices
        "VISTA_DATASETS": ["snemi3d"], "VISTA_SLICES": True, "VISTA_PATCH_SIZE": [1, 256, 256],
        "VISTA_BATCH_SIZE": 8, "VISTA_LR": 1e-4, "VISTA_WEIGHT_DECAY": 1e-5, "PRECISION": "fp32"},
    "snemi3d": {
        "VISTA_DATASETS": ["snemi3d"], "VISTA_LR": 1e-4, "VISTA_WEIGHT_DECAY": 1e-5, "PRECISION": "fp16"},
    "cremi3d": {
        "VISTA_DATASETS": ["cremi3d"], "VISTA_LR": 1e-4, "VISTA_WEIGHT_DECAY": 1e-5, "PRECISION": "fp16",
        "VISTA_EPOCHS": 200, "VISTA_FINAL_LR": 1e-7,
        "VISTA_CLASS_WEIGHTS": [0.1, 0.5, 0.4, 0.4, 0.5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]},
    "combine": {                 # two data sets, one space of classes
        "VISTA_DATASETS": ["snemi3d", "cremi3d"], "VISTA_LR": 1e-4, "VISTA_WEIGHT_DECAY": 1e-5,
        "PRECISION": "fp16", "VISTA_EPOCHS": 300, "VISTA_FINAL_LR": 1e-7, "VISTA_PATIENCE": 50,
        "VISTA_CLASS_WEIGHTS": [0.1, 0.4, 0.3, 0.2, 0.4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]},
    "foundation": {              # all three
        "VISTA_DATASETS": ["snemi3d", "cremi3d", "mitoem2"],
        "VISTA_PATCH_SIZE": [64, 128, 128], "VISTA_BATCH_SIZE": 2, "VISTA_UPDATE_EVERY_BATCHES": 4,
        "VISTA_LR": 2e-4, "VISTA_EPOCHS": 500, "VISTA_FINAL_LR": 1e-7, "VISTA_PATIENCE": 40,
        "VISTA_VAL_EVERY": 2, "VISTA_EMBEDDING": 32, "KEEP_TOP_K": 5, "PRECISION": "bf16",
        "VISTA_CLASS_WEIGHTS": [0.05, 0.35, 0.25, 0.2, 0.15, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]},
    "em_small": {                # an hour on two CPU cores, for isotropic volumes without lost sections
        "VISTA_ENCODER": "segresnet", "VISTA_FEATURES": 16, "VISTA_HEAD_WIDTH": 32, "VISTA_BATCH_SIZE": 1,
        "VISTA_PATCH_SIZE": [64, 64, 64], "VISTA_LR": 3e-3, "VISTA_WARMUP_STEPS": 0.02, "VISTA_EPOCHS": 24,
        "VISTA_CROPS_PER_EPOCH": 100, "VISTA_VAL_EVERY": 8, "VISTA_VAL_CROPS": 6, "VISTA_CACHE_RATE": 1.0,
        "VISTA_WEIGHT_EDGE": 3.0, "VISTA_WEIGHT_BONE": 1.0, "VISTA_AUG_ANGLE": 0.0, "VISTA_AUG_ELASTIC": 0.0,
        "VISTA_AUG_MISSING": 0.0, "VISTA_AUG_SHIFT": 0.0, "VISTA_AUG_DEFECTS": 0.0,
        "VISTA_AUG_NOISE_STD": 0.05, "EMA_DECAY": 0.99},
    "em_demo": {                 # minutes on two CPU cores
        "VISTA_ENCODER": "segresnet", "VISTA_FEATURES": 16, "VISTA_HEAD_WIDTH": 32, "VISTA_BATCH_SIZE": 1,
        "VISTA_PATCH_SIZE": [32, 64, 64], "VISTA_LR": 3e-3, "VISTA_WARMUP_STEPS": 0.02, "VISTA_EPOCHS": 2,
        "VISTA_CROPS_PER_EPOCH": 150, "VISTA_VAL_CROPS": 4, "VISTA_CACHE_RATE": 1.0,
        "VISTA_CLASS_WEIGHTS": [0.5, 1, 1, 1, 4, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        "VISTA_WEIGHT_EDGE": 3.0, "VISTA_WEIGHT_BONE": 1.0, "VISTA_AUG_ELASTIC": 0.0, "VISTA_AUG_ANGLE": 0.0,
        "VISTA_AUG_MISSING": 0.0, "VISTA_AUG_SHIFT": 0.0, "VISTA_AUG_DEFECTS": 0.0, "VISTA_AUG_GAMMA": 0.0,
        "VISTA_AUG_CONTRAST": 0.0, "VISTA_AUG_NOISE_STD": 0.05, "EMA_DECAY": 0.98},
    "brain_tiny": {              # 40 minutes of pretraining on 98 studies on two CPU cores
        "STUDY_VIT": "tiny", "JEPA_LR": 3e-4, "JEPA_START_LR": 5e-5, "JEPA_TEACHER_MOMENTUM": [0.998, 1.0],
        "JEPA_PREDICTOR_DIM": 192, "JEPA_PREDICTOR_HEADS": 6, "MIL_EPOCHS": 20, "MIL_LR": 1e-3,
        "MIL_ATTENTION_DIM": 128, "MIL_MLP_DIMS": [128],
        "STUDY_VAL_FRACTION": 0.1, "STUDY_TEST_FRACTION": 0.3},
    "brain_demo": {              # minutes on two CPU cores, for train_pretrain.py and train_finetune.py
        "STUDY_VIT": "custom", "STUDY_VIT_DIM": 192, "STUDY_VIT_DEPTH": 4, "STUDY_VIT_HEADS": 4,
        "JEPA_EPOCHS": 20, "JEPA_BATCH_SIZE": 4, "JEPA_TEACHER_MOMENTUM": [0.99, 1.0],
        "JEPA_PREDICTOR_DIM": 128, "JEPA_PREDICTOR_DEPTH": 2, "JEPA_PREDICTOR_HEADS": 4,
        "MIL_EPOCHS": 20, "MIL_ATTENTION_DIM": 64, "MIL_MLP_DIMS": [64], "MIL_LR": 1e-3, "EMA_DECAY": 0.9,
        "MIL_MONITOR": "val/loss", "MIL_MONITOR_MODE": "min"},
    "hvit_pretrain": {           # train_pretrain.py --method simclr
        "HVIT_MODEL": "hvit_small", "HVIT_IMG_SIZE": 256, "SIMCLR_EPOCHS": 100, "SIMCLR_BATCH_SIZE": 64,
        "SIMCLR_LR": 3e-4, "SIMCLR_WEIGHT_DECAY": 1e-4, "SIMCLR_WARMUP_STEPS": 0.1,
        "SIMCLR_TEMPERATURE": 0.07, "SIMCLR_PROJECTION_DIM": 128, "ACTIVATION_CHECKPOINTING": True},
    "hvit_finetune": {           # train_finetune.py --task hvit
        "HVIT_MODEL": "hvit_small", "HVIT_IMG_SIZE": 256, "HVIT_DROP_PATH": 0.2, "HVIT_EPOCHS": 100,
        "HVIT_BATCH_SIZE": 32, "HVIT_LR": 1e-4, "HVIT_WEIGHT_DECAY": 0.01, "HVIT_WARMUP_STEPS": 0.05,
        "USE_EMA": True, "EMA_DECAY": 0.9999, "HVIT_MIXUP_ALPHA": 0.8, "HVIT_CUTMIX_ALPHA": 1.0,
        "HVIT_LOSS": "combined", "HVIT_FOCAL_GAMMA": 2.0, "HVIT_LABEL_SMOOTHING": 0.1,
        "HVIT_SEVERITY": "moderate"},
    "leaf_small": {              # a quarter of an hour of a CPU core each, for some hundred photographs
        "HVIT_MODEL": "hvit_tiny", "HVIT_IMG_SIZE": 160, "HVIT_CACHE_RATE": 1.0, "HVIT_DROP_PATH": 0.1,
        "HVIT_TEST_FRACTION": 0.25, "SIMCLR_EPOCHS": 150, "SIMCLR_LR": 5e-4, "SIMCLR_TEMPERATURE": 0.1,
        "SIMCLR_BRIGHTNESS": 0.4, "SIMCLR_CONTRAST": 0.4, "SIMCLR_SATURATION": 0.2, "SIMCLR_HUE": 0.02,
        "SIMCLR_GRAYSCALE": 0.0,        # colours tell diseases: a network that must not see them cannot
        "HVIT_EPOCHS": 40, "HVIT_BATCH_SIZE": 16, "HVIT_LR": 5e-4, "HVIT_WEIGHT_DECAY": 0.05,
        "HVIT_WARMUP_STEPS": 0.1, "HVIT_PATIENCE": 0, "HVIT_MIXUP_PROB": 0.25, "HVIT_CUTMIX_PROB": 0.25,
        "EMA_DECAY": 0.99, "SAVE_EVERY_EPOCHS": 0, "KEEP_TOP_K": 1},
    "leaf_demo": {               # minutes on two CPU cores; so few leaves are too few for a transformer
        "HVIT_MODEL": "efficientnet_b0", "HVIT_IMG_SIZE": 96, "HVIT_CACHE_RATE": 1.0, "HVIT_DROP_PATH": 0.0,
        "SIMCLR_EPOCHS": 8, "SIMCLR_BATCH_SIZE": 32, "SIMCLR_LR": 1e-3, "SIMCLR_TEMPERATURE": 0.2,
        "SIMCLR_BRIGHTNESS": 0.4, "SIMCLR_CONTRAST": 0.4, "SIMCLR_SATURATION": 0.2, "SIMCLR_HUE": 0.02,
        "SIMCLR_GRAYSCALE": 0.0, "SIMCLR_PROBE_EVERY": 2,
        "HVIT_EPOCHS": 15, "HVIT_BATCH_SIZE": 16, "HVIT_LR": 3e-3, "HVIT_WARMUP_STEPS": 0.1,
        "HVIT_PATIENCE": 0, "HVIT_MIXUP_PROB": 0.0, "HVIT_CUTMIX_PROB": 0.0, "HVIT_SEVERITY": "light",
        "EMA_DECAY": 0.95},
    "foundation_radimagenet": {  # --data: RadImageNet as published; then --init into the next four
        "SPINE_LAYOUT": "radimagenet", "SPINE_DEMO_TABLE": "anatomy", "SPINE_SIZE": 224, "SPINE_EPOCHS": 200,
        "SPINE_BATCH_SIZE": 768, "SPINE_LR": 1e-3, "SPINE_BALANCE": True, "PRECISION": "fp16",
        "SAVE_EVERY_EPOCHS": 0, "KEEP_TOP_K": 5, "SAMPLES_PER_EPOCH": 3},
    "axial_basic": {             # which part of the body
        "SPINE_DEMO_TABLE": "anatomy", "SPINE_SIZE": 224, "SPINE_EPOCHS": 25, "SPINE_BATCH_SIZE": 200,
        "SPINE_LR": 1e-3, "SPINE_BALANCE": True, "PRECISION": "fp16", "SAVE_EVERY_EPOCHS": 0, "KEEP_TOP_K": 5,
        "SAMPLES_PER_EPOCH": 3},
    "spine_location_view": {     # such as cervical_sagittal
        "SPINE_DEMO_TABLE": "location_view", "SPINE_SIZE": 224, "SPINE_EPOCHS": 100, "SPINE_BATCH_SIZE": 200,
        "SPINE_LR": 1e-3, "SPINE_BALANCE": True, "PRECISION": "fp16", "SAVE_EVERY_EPOCHS": 0, "KEEP_TOP_K": 5,
        "SAMPLES_PER_EPOCH": 3},
    "cervical_sequence": {       # such as T2w
        "SPINE_DEMO_TABLE": "sequence", "SPINE_SIZE": 224, "SPINE_EPOCHS": 50, "SPINE_BATCH_SIZE": 200,
        "SPINE_LR": 1e-3, "SPINE_BALANCE": True, "PRECISION": "fp16", "SAVE_EVERY_EPOCHS": 0, "KEEP_TOP_K": 5,
        "SAMPLES_PER_EPOCH": 3},
    "cord_classification": {     # whether a slice shows the cord
        "SPINE_DEMO_TABLE": "cord", "SPINE_SIZE": 224, "SPINE_EPOCHS": 25, "SPINE_BATCH_SIZE": 200,
        "SPINE_LR": 1e-3, "SPINE_BALANCE": True, "PRECISION": "fp16", "SAVE_EVERY_EPOCHS": 0, "KEEP_TOP_K": 5,
        "SAMPLES_PER_EPOCH": 3},
    "cord_segmentation": {       # the original: a plain encoder of 64 features; this one takes a classifier's
        "SPINE_DEMO_TABLE": "cord_masks", "SPINE_SIZE": 320, "SPINE_ENCODER": "resnet18",
        "SPINE_LOSS": "bce", "SPINE_EPOCHS": 300, "SPINE_BATCH_SIZE": 16, "SPINE_LR": 2e-4,
        "OPTIMIZER": "adam", "SPINE_WEIGHT_DECAY": 0.0, "SPINE_SCHEDULE": "step", "STEP_GAMMA": 1.0,
        "PRECISION": "fp16", "SAVE_EVERY_EPOCHS": 0, "KEEP_TOP_K": 5, "SAMPLES_PER_EPOCH": 3},
    "lesion_pretraining": {      # masks of the cord, lesions painted into it; then --init into the last
        "SPINE_DEMO_TABLE": "cord_masks", "SPINE_LESIONS": 1.0, "SPINE_LESIONS_IN_VALIDATION": True,
        "SPINE_SIZE": 320, "SPINE_ENCODER": "plain", "SPINE_FEATURES": 16, "SPINE_LOSS": "dice",
        "SPINE_SEVERITY": "heavy", "SPINE_EPOCHS": 200, "SPINE_BATCH_SIZE": 96, "SPINE_LR": 1e-3,
        "OPTIMIZER": "adam", "SPINE_WEIGHT_DECAY": 0.0, "SPINE_SCHEDULE": "step", "STEP_GAMMA": 1.0,
        "PRECISION": "fp32", "SAVE_EVERY_EPOCHS": 0, "KEEP_TOP_K": 5, "SAMPLES_PER_EPOCH": 3},
    "lesion_segmentation": {     # from scratch
        "SPINE_DEMO_TABLE": "lesion_masks", "SPINE_MASK_WORD": "lesion", "SPINE_MASK_CLASSES": ["lesion"],
        "SPINE_SIZE": 320, "SPINE_ENCODER": "plain", "SPINE_FEATURES": 16, "SPINE_LOSS": "dice",
        "SPINE_SEVERITY": "heavy", "SPINE_EPOCHS": 200, "SPINE_BATCH_SIZE": 64, "SPINE_LR": 1e-3,
        "OPTIMIZER": "adam", "SPINE_WEIGHT_DECAY": 0.0, "SPINE_SCHEDULE": "step", "STEP_GAMMA": 1.0,
        "PRECISION": "fp32", "SAVE_EVERY_EPOCHS": 0, "KEEP_TOP_K": 5, "SAMPLES_PER_EPOCH": 3},
    "lesion_segmentation_pretrained": {    # with --init of lesion_pretraining
        "SPINE_DEMO_TABLE": "lesion_masks", "SPINE_MASK_WORD": "lesion", "SPINE_MASK_CLASSES": ["lesion"],
        "SPINE_SIZE": 320, "SPINE_ENCODER": "plain", "SPINE_FEATURES": 16, "SPINE_LOSS": "dice",
        "SPINE_SEVERITY": "heavy", "SPINE_EPOCHS": 200, "SPINE_BATCH_SIZE": 64, "SPINE_LR": 1e-3,
        "OPTIMIZER": "adam", "SPINE_WEIGHT_DECAY": 0.0, "SPINE_SCHEDULE": "step", "STEP_GAMMA": 1.0,
        "PRECISION": "fp32", "SAVE_EVERY_EPOCHS": 0, "KEEP_TOP_K": 5, "SAMPLES_PER_EPOCH": 3},
    "spine_small": {             # classes, minutes of a CPU core on some hundred slices
        "SPINE_SIZE": 96, "SPINE_EPOCHS": 6, "SPINE_BATCH_SIZE": 16, "SPINE_LR": 1e-3, "SPINE_BALANCE": True,
        "EMA_DECAY": 0.95, "SAVE_EVERY_EPOCHS": 0, "KEEP_TOP_K": 1, "SAMPLES_PER_EPOCH": 3},
    "spine_small_masks": {       # the same for masks
        "SPINE_SIZE": 96, "SPINE_FIELD_MM": 80.0, "SPINE_ENCODER": "plain", "SPINE_FEATURES": 16,
        "SPINE_EPOCHS": 12,
        "SPINE_BATCH_SIZE": 8, "SPINE_LR": 3e-3, "SPINE_SEVERITY": "heavy", "EMA_DECAY": 0.95,
        "SAVE_EVERY_EPOCHS": 0, "KEEP_TOP_K": 1, "SAMPLES_PER_EPOCH": 3},
    "spine_demo": {              # half a minute a stage on two CPU cores; which stage: SPINE_DEMO_TABLE
        "RUNS_DIR": "runs/spine_demo",      # runs named after their stages: --weights of infer_cascade.py
        "SPINE_SIZE": 96, "SPINE_EPOCHS": 2, "SPINE_BATCH_SIZE": 16, "SPINE_LR": 1e-3, "SPINE_BALANCE": True,
        "EMA_DECAY": 0.95, "SAVE_EVERY_EPOCHS": 0, "KEEP_TOP_K": 1, "SAMPLES_PER_EPOCH": 3},
    "spine_demo_masks": {        # the same for masks
        "RUNS_DIR": "runs/spine_demo", "SPINE_DEMO_TABLE": "cord_masks", "SPINE_SIZE": 128,
        "SPINE_ENCODER": "plain", "SPINE_FEATURES": 16, "SPINE_EPOCHS": 6, "SPINE_BATCH_SIZE": 8,
        "SPINE_LR": 5e-3, "SPINE_WARMUP_STEPS": 0.1, "EMA_DECAY": 0.95, "SAVE_EVERY_EPOCHS": 0,
        "KEEP_TOP_K": 1, "SAMPLES_PER_EPOCH": 3},
    "spine_demo_lesions": {      # the same for lesions, which few slices have, and few pixels of these
        "RUNS_DIR": "runs/spine_demo", "SPINE_DEMO_TABLE": "lesion_masks", "SPINE_MASK_CLASSES": ["lesion"],
        "SPINE_SIZE": 128, "SPINE_ENCODER": "plain", "SPINE_FEATURES": 16, "SPINE_EPOCHS": 5,
        "SPINE_BATCH_SIZE": 8, "SPINE_LR": 1e-3, "SPINE_BALANCE": True, "SPINE_LOSS": "combined",
        "SPINE_CLASS_WEIGHTS": [1.0, 10.0], "EMA_DECAY": 0.95, "SAVE_EVERY_EPOCHS": 0, "KEEP_TOP_K": 1,
        "SAMPLES_PER_EPOCH": 3},
    "demo": {                    # the smallest useful run: minutes on two CPU cores
        "EFFICIENTNET": "b0", "VIT": "tiny", "IMG_SIZE": 128, "MASK_PATCH_SIZE": 32, "BATCH_SIZE": 8,
        "UPDATE_EVERY_BATCHES": 1, "LONGITUDINAL_MIM_EPOCHS": 8, "MAX_LR": 1e-3, "MASK_PROB_HIGH": 0.2,
        "DECODER_CHANNELS": [128, 96, 64, 48, 32], "EMA_DECAY": 0.99},
    "xray_256": {                # an hour on two CPU cores
        "EFFICIENTNET": "b0", "VIT": "tiny", "IMG_SIZE": 256, "MASK_PATCH_SIZE": 64, "BATCH_SIZE": 8,
        "UPDATE_EVERY_BATCHES": 1, "LONGITUDINAL_MIM_EPOCHS": 6, "MAX_LR": 1e-3,
        "DECODER_CHANNELS": [128, 96, 64, 48, 32], "EMA_DECAY": 0.995},
}
