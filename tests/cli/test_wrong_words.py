"""Command lines that are wrong: one line, status 2, and nothing is written."""

import gc
import os
import shlex
import warnings

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("one_machine", "drawn_once")

COMMAND_LINES = [
    ("swep", "the command must be 'sweep', 'plot', 'sensitivity', 'status', 'figure', 'theory', 'in"),
    ("--out OUT", "the command must be 'sweep', 'plot', 'sensitivity', 'status', 'figure', 'theory', 'in"),
    ("-v", "the command must be 'sweep', 'plot', 'sensitivity', 'status', 'figure', 'theory', 'in"),
    ("help", "the command must be 'sweep', 'plot', 'sensitivity', 'status', 'figure', 'theory', 'in"),
    ("sweep sweep --out OUT", "Unrecognized options: sweep"),
    ("sweep", "--out must be given"),
    ("sweep --out", "Missing value for argument '--out'. Expected 1 values."),
    ("sweep --out=", "out must be a folder's name, got ''"),
    ("sweep --out OUT extra", "Unrecognized options: extra"),
    ("sweep OUT", "--out must be given"),
    ("sweep --out OUT --alpa 1", "Unrecognized options: --alpa, 1 (did you mean --alpha?)"),
    ("sweep --out OUT --seed 5", "Unrecognized options: --seed, 5 (did you mean --seeds?)"),
    ("sweep --out OUT --Alpha 1", "Unrecognized options: --Alpha, 1 (did you mean --alpha?)"),
    ("sweep --out OUT -alpha 1", "Unrecognized options: -alpha, 1"),
    ("sweep --out OUT --alpha", "--alpha must be one value or several, got ''"),
    ("sweep --out OUT --alpha=", "--alpha must be one value or several, got ''"),
    ("sweep --out OUT --alpha ,", "--alpha must be one value or several, got ','"),
    ("sweep --out OUT --alpha 1e-3,", "--alpha must be one value or several, got '1e-3,'"),
    ("sweep --out OUT --alpha 1e-3,,1e-4", "--alpha must be one value or several, got '1e-3,,1e-4'"),
    ("sweep --out OUT --alpha small", "--alpha must be a number, got 'small'"),
    ("sweep --out OUT --alpha 1e-3 small", "--alpha must be a number, got 'small'"),
    ("sweep --out OUT --alpha 0", "alpha must be positive and finite, got 0.0"),
    ("sweep --out OUT --alpha -1e-3", "alpha must be positive and finite, got -0.001"),
    ("sweep --out OUT --alpha nan", "alpha must be positive and finite, got nan"),
    ("sweep --out OUT --alpha inf", "alpha must be positive and finite, got inf"),
    ("sweep --out OUT --alpha 1e-3 1e-3", "alpha must name each value once, got (0.001, 0.001)"),
    ("sweep --out OUT --alpha 1e-3,1e-3", "alpha must name each value once, got (0.001, 0.001)"),
    ("sweep --out OUT --alpha 1e999", "alpha must be positive and finite, got inf"),
    ("sweep --out OUT --alpha 0x10", "--alpha must be a number, got '0x10'"),
    ("sweep --out OUT --alpha 1:2", "--alpha must be FROM:TO:COUNT, from 0 or a positive number to a positi"),
    ("sweep --out OUT --alpha 1:2:3:4", "--alpha must be FROM:TO:COUNT, from 0 or a positive number to a positi"),
    ("sweep --out OUT --alpha 1e-6:1e-2:1", "--alpha must be FROM:TO:COUNT, from 0 or a positive number to a positi"),
    ("sweep --out OUT --alpha 1e-6:1e-2:0", "--alpha must be FROM:TO:COUNT, from 0 or a positive number to a positi"),
    ("sweep --out OUT --alpha 1e-6:1e-2:x", "--alpha must be an integer, got 'x'"),
    (
        "sweep --out OUT --alpha 1e-6:1e-2:1e12",
        "--alpha must be FROM:TO:COUNT, from 0 or a positive number to a positi",
    ),
    ("sweep --out OUT --alpha -1:1:3", "--alpha must be FROM:TO:COUNT, from 0 or a positive number to a positi"),
    ("sweep --out OUT --alpha 1:inf:3", "--alpha must be FROM:TO:COUNT, from 0 or a positive number to a positi"),
    ("sweep --out OUT --alpha nan:1:3", "--alpha must be FROM:TO:COUNT, from 0 or a positive number to a positi"),
    ("sweep --out OUT --alpha 1e-3:1e-3:2", "alpha must name each value once, got (0.001, 0.001)"),
    ("sweep --out OUT --alpha ::", "--alpha must be a number, got ''"),
    ("sweep --out OUT --alpha 0:1:3", "alpha must be positive and finite, got 0.0"),
    ("sweep --out OUT --alpha 1e-400", "alpha must be positive and finite, got 0.0"),
    ("sweep --out OUT --alpha 1 --alpha 2", "--alpha must be given once, got it 2 times"),
    ("sweep --out OUT --alpha=1 --alpha=1", "--alpha must be given once, got it 2 times"),
    ("sweep --out OUT --out OUT", "--out must be given once, got it 2 times"),
    ("sweep --out OUT --resume --no-resume", "--resume must be given once, got it 2 times"),
    ("sweep --out OUT --details --details", "--details must be given once, got it 2 times"),
    ("sweep --out OUT --delta-w 0.5 --delta_w 0.5", "--delta-w must be given once, got it 2 times"),
    ("sweep --out OUT --resume yes", "Unrecognized options: yes"),
    ("sweep --out OUT --resume=true", "Unrecognized options: true"),
    ("sweep --out OUT --rank 0", "rank must lie between 1 and 10, the smallest layer dimension, got 0"),
    ("sweep --out OUT --rank -1", "rank must lie between 1 and 10, the smallest layer dimension, got -1"),
    ("sweep --out OUT --rank 11", "rank must lie between 1 and 10, the smallest layer dimension, got 11"),
    ("sweep --out OUT --rank 1.5", "--rank must be an integer, got '1.5'"),
    ("sweep --out OUT --rank four", "--rank must be an integer, got 'four'"),
    ("sweep --out OUT --rank 4 4", "rank must name each value once, got (4, 4)"),
    ("sweep --out OUT --rank 4,4", "rank must name each value once, got (4, 4)"),
    ("sweep --out OUT --rank 1:", "--rank must be FROM:TO or FROM:TO:STEP, integers, TO above FROM and le"),
    ("sweep --out OUT --rank :4", "--rank must be FROM:TO or FROM:TO:STEP, integers, TO above FROM and le"),
    ("sweep --out OUT --rank 4:1", "--rank must be FROM:TO or FROM:TO:STEP, integers, TO above FROM and le"),
    ("sweep --out OUT --rank 4:4", "--rank must be FROM:TO or FROM:TO:STEP, integers, TO above FROM and le"),
    ("sweep --out OUT --rank 1:9:0", "--rank must be FROM:TO or FROM:TO:STEP, integers, TO above FROM and le"),
    ("sweep --out OUT --rank 1:9:-1", "--rank must be FROM:TO or FROM:TO:STEP, integers, TO above FROM and le"),
    ("sweep --out OUT --rank 1:x", "--rank must be an integer, got 'x'"),
    ("sweep --out OUT --rank 0:3", "rank must lie between 1 and 10, the smallest layer dimension, got 0"),
    (
        "sweep --out OUT --rank 1:99999999999999999999",
        "--rank must be FROM:TO or FROM:TO:STEP, integers, TO above FROM and le",
    ),
    ("sweep --out OUT --rank nan", "--rank must be an integer, got 'nan'"),
    ("sweep --out OUT --rank 1e20", "rank must be at most 2147483647, got 100000000000000000000"),
    ("sweep --out OUT --seeds 0", "seeds must be at least 1, got 0"),
    ("sweep --out OUT --seeds -1", "seeds must be at least 1, got -1"),
    ("sweep --out OUT --seeds 1.5", "--seeds must be an integer, got '1.5'"),
    ("sweep --out OUT --seeds ten", "--seeds must be an integer, got 'ten'"),
    ("sweep --out OUT --seeds 1e20", "seeds must be at most 9223372036854775807, got 100000000000000000000"),
    (
        "sweep --out OUT --seeds 99999999999999999999",
        "seeds must be at most 9223372036854775807, got 99999999999999999999",
    ),
    ("sweep --out OUT --seeds 2e9", "out must have room for 13 TB of results (seeds 2000000000), got"),
    ("sweep --out OUT --seeds 0 0", "seeds must name each value once, got (0, 0)"),
    ("sweep --out OUT --seeds -1 0", "seeds must be integers from 0 to 9223372036854775807, got -1"),
    (
        "sweep --out OUT --seeds 0 99999999999999999999",
        "seeds must be at most 9223372036854775807, got 99999999999999999999",
    ),
    ("sweep --out OUT --seeds 5:5", "--seeds must be FROM:TO or FROM:TO:STEP, integers, TO above FROM and l"),
    ("sweep --out OUT --seeds 0:60:", "--seeds must be FROM:TO or FROM:TO:STEP, integers, TO above FROM and l"),
    ("sweep --out OUT --seeds inf", "--seeds must be an integer, got 'inf'"),
    ("sweep --out OUT --t1 0", "t1 must be positive and finite, got 0.0"),
    ("sweep --out OUT --t1 -5", "t1 must be positive and finite, got -5.0"),
    ("sweep --out OUT --t1 inf", "t1 must be positive and finite, got inf"),
    ("sweep --out OUT --t1 nan", "t1 must be positive and finite, got nan"),
    ("sweep --out OUT --t1 long", "--t1 must be a number, got 'long'"),
    ("sweep --out OUT --t1 1 2", "Unrecognized options: 2"),
    ("sweep --out OUT --t1 1,2", "--t1 must be a number, got '1,2'"),
    ("sweep --out OUT --t1 1e-400", "t1 must be positive and finite, got 0.0"),
    ("sweep --out OUT --saves 0", "saves must be at least 2, or an array of times, got 0"),
    ("sweep --out OUT --saves 1", "saves must be at least 2, or an array of times, got 1"),
    ("sweep --out OUT --saves -5", "saves must be at least 2, or an array of times, got -5"),
    ("sweep --out OUT --saves 2.5", "--saves must be an integer, got '2.5'"),
    ("sweep --out OUT --saves 1e9", "saves must be small enough for"),
    ("sweep --out OUT --saves 1e20", "saves must be at most 2147483647, got 100000000000000000000"),
    ("sweep --out OUT --saves nan", "--saves must be an integer, got 'nan'"),
    ("sweep --out OUT --spacing lgo", "spacing must be 'linear' or 'log', got 'lgo' (did you mean 'log'?)"),
    ("sweep --out OUT --spacing", "Missing value for argument '--spacing'. Expected 1 values."),
    ("sweep --out OUT --init spektral", "t', got 'spektral' (did you mean 'spectral'?)"),
    ("sweep --out OUT --init gaussian,", "--init must be one value or several, got 'gaussian,'"),
    (
        "sweep --out OUT --init gaussian gaussian",
        "each value once, own ones as in Scheme(init, name='mine'), got ('gaussian', 'gaussian')",
    ),
    ("sweep --out OUT --init gaussian:2", "init must come without a number for 'gaussian', got 'gaussian:2'"),
    (
        "sweep --out OUT --init spectral --rank 1 --component top 1 --shift-scale 5",
        "rank must be at least 2, the rank of the shift, for init spectral, got",
    ),
    (
        "sweep --out OUT --init gaussian-both:x --problem network",
        "init must have a number after the colon, got 'gaussian-both:x'",
    ),
    ("sweep --out OUT --init gaussian-both:0 --problem network", "ratio must be positive and finite, got 0.0"),
    ("sweep --out OUT --init gaussian-both:-1 --problem network", "ratio must be positive and finite, got -1.0"),
    (
        "sweep --out OUT --init gaussian-both: --problem network",
        "init must have a number after the colon, got 'gaussian-both:'",
    ),
    ("sweep --out OUT --init eva", "problem must feed every layer with inputs that have principal directio"),
    ("sweep --out OUT --side C", "side must be 'A' or 'B', got 'C'"),
    ("sweep --out OUT --side a", "side must be 'A' or 'B', got 'a'"),
    ("sweep --out OUT --side A A", "side must name each value once, got ('A', 'A')"),
    ("sweep --out OUT --side A,C", "side must be 'A' or 'B', got 'C'"),
    ("sweep --out OUT --problem digit", "problem must be 'aligned', 'pretrained', 'regression', 'network', 'symm"),
    ("sweep --out OUT --problem none.npz", "problem must be a file that exists, got"),
    ("sweep --out OUT --problem OUT/", "problem must be an .npz or .safetensors file, got"),
    ("sweep --out OUT --problem DIR", "problem must be an .npz or .safetensors file, got"),
    ("sweep --out OUT --problem TEXT", "problem must be an .npz or .safetensors file, got"),
    ("sweep --out OUT --problem SHAPES", "w2 must have as many columns as w1 has rows (3), got shape (2, 4)"),
    ("sweep --out OUT --problem NAN", "shift must be finite, got 1 entries that are NaN or infinite"),
    ("sweep --out OUT --problem EMPTYNPZ", "problem must be a readable .npz file, got"),
    ("sweep --out OUT --problem CUTNPZ", "cut.npz' (File is not a zip file)"),
    ("sweep --out OUT --problem BADNPZ", "bad.npz' (Bad CRC-32 for file 'w1.npy')"),
    (
        "sweep --out OUT --problem BROKENST",
        "must have a header of at most 65536 bytes, got 18446744073709551615)",
    ),
    (
        "sweep --out OUT --problem NAMES",
        "must be 'w1', 'w2', 'shift' or 'target' (files of one layer are not read: SingleLayer(shift, weight=w) takes "
        "its arrays in Python), got 'a'",
    ),
    ("sweep --out OUT --problem OBJECTS", "objects.npz' must hold real numbers, got entries of type object)"),
    ("sweep --out OUT --problem LOOP", "problem must be an .npz or .safetensors file, got"),
    ("sweep --out OUT --problem digits --m 4", "m must be left out with problem 'digits', got 4"),
    ("sweep --out OUT --problem digits --h 4", "h must be left out with problem 'digits', got 4"),
    ("sweep --out OUT --problem GOOD --h 4", "h must be left out with problem"),
    (
        "sweep --out OUT --problem regression --delta-w 1",
        "delta_w must be left out with problem 'regression', got (1.0,)",
    ),
    ("sweep --out OUT --problem network --angle 5", "angle must be left out with problem 'network', got (5.0,)"),
    ("sweep --out OUT --m 0", "m must be at least 1, got 0"),
    ("sweep --out OUT --m -1", "m must be at least 1, got -1"),
    ("sweep --out OUT --m 1.5", "--m must be an integer, got '1.5'"),
    ("sweep --out OUT --m 1e9", "m must be small enough for"),
    ("sweep --out OUT --n 0", "n must be at least 1, got 0"),
    ("sweep --out OUT --h 0", "h must be at least 1, got 0"),
    ("sweep --out OUT --h 1e9", "h must be small enough for"),
    ("sweep --out OUT --h 1e22", "h must be at most 2147483647, got 10000000000000000000000"),
    ("sweep --out OUT --delta-w 0", "delta_w must be positive, got 0.0"),
    ("sweep --out OUT --delta-w -1", "delta_w must be positive, got -1.0"),
    ("sweep --out OUT --delta-w nan", "delta_w must be positive, got nan"),
    ("sweep --out OUT --delta-w 1 1", "delta_w must name each value once, got (1.0, 1.0)"),
    ("sweep --out OUT --shift-scale 0", "shift_scale must be positive, got 0.0"),
    ("sweep --out OUT --shift-scale nan", "shift_scale must be positive, got nan"),
    ("sweep --out OUT --shift-scale 1 2", "shift_scale must be one number or 1 of them, got 2"),
    ("sweep --out OUT --component botom", "component must be 'top' or 'bottom' or an index, got 'botom' (did you"),
    ("sweep --out OUT --component 10", "component must be an index below 10, the number of components, got 10"),
    ("sweep --out OUT --component -11", "component must be an index below 10, the number of components, got -11"),
    ("sweep --out OUT --component top 0", "component must name each component once, got ('top', '0')"),
    ("sweep --out OUT --component 1.5", "component must be 'top' or 'bottom' or an index, got '1.5'"),
    ("sweep --out OUT --problem regression --target-rank 0", "target_rank must be at least 1, got 0"),
    ("sweep --out OUT --problem regression --target-rank 11", "target_rank must be at most 10, got 11"),
    ("sweep --out OUT --problem regression --kappa 0.5", "kappa must be at least 1, got 0.5"),
    ("sweep --out OUT --problem regression --kappa inf", "kappa must be at least 1, got inf"),
    ("sweep --out OUT --problem regression --samples -1", "samples must be at least 0, for infinitely many, got -1"),
    ("sweep --out OUT --problem regression --samples 1e12", "samples must be at most 2147483647, got 1000000000000"),
    ("sweep --out OUT --problem regression --activation tanh", "activation must be 'linear' or 'relu', got 'tanh'"),
    (
        "sweep --out OUT --problem regression --activation relu",
        "samples must be at least 1 with activation relu, got 0",
    ),
    ("sweep --out OUT --problem regression --input-kappa 0", "input_kappa must be at least 1, got 0.0"),
    (
        "sweep --out OUT --problem network --input-rank 11",
        "input_rank must lie between 0, for all, and 10, the number of inputs,",
    ),
    ("sweep --out OUT --problem network --target-noise -1", "target_noise must be at least 0, got -1.0"),
    (
        "sweep --out OUT --problem network --init pissa",
        "problem must know its pretrained weights, as `weights`, for pissa, got",
    ),
    (
        "sweep --out OUT --problem pretrained --pretraining pissa",
        "pretraining must be an initialisation of networks (lora-flow inits mar",
    ),
    (
        "sweep --out OUT --problem pretrained --pretraining nothing",
        "pretraining: init must be 'gaussian', 'orthogonal', 'spectral', 'lora-",
    ),
    (
        "sweep --out OUT --problem pretrained --pretraining-alpha 0",
        "pretraining_alpha must be positive and finite, got 0.0",
    ),
    ("sweep --out OUT --problem-seed x", "--problem-seed must be an integer, got 'x'"),
    ("sweep --out OUT --problem-seed 1e20", "problem_seed must be at most 9223372036854775807, got 1000000000000000"),
    ("sweep --out OUT --problem-seed 0 0", "problem_seed must name each value once, got (0, 0)"),
    ("sweep --out OUT --angle -1", "angle must lie between 0 and 90 degrees, got -1.0"),
    ("sweep --out OUT --angle 91", "angle must lie between 0 and 90 degrees, got 91.0"),
    ("sweep --out OUT --angle nan", "angle must lie between 0 and 90 degrees, got nan"),
    ("sweep --out OUT --noise -1", "noise must be at least 0, got -1.0"),
    ("sweep --out OUT --noise inf", "noise must be at least 0, got inf"),
    (
        "sweep --out OUT --flow plane",
        "flow must be 'plain', 'lora-plus', 'scaled', 'lora-pro', 'shrink-a', 'stable-lora'",
    ),
    ("sweep --out OUT --flow lora-plus", "flow must come with a number after a colon for 'lora-plus', got 'lora-"),
    ("sweep --out OUT --flow lora-plus:0", "ratio must be positive, got 0.0"),
    ("sweep --out OUT --flow lora-plus:x", "flow must have a number after the colon, got 'lora-plus:x'"),
    ("sweep --out OUT --flow scaled:-1", "damping must be at least 0, got -1.0"),
    (
        "sweep --out OUT --flow scaled --solver RKC",
        "solver must be of another kind than RKC for ScaledGD, whose",
    ),
    ("sweep --out OUT --flow shrink-a", "flow must come with a number after a colon for 'shrink-a', got 'shrink"),
    ("sweep --out OUT --flow stable-lora:-1", "rate must be at least 0, got -1.0"),
    (
        "sweep --out OUT --flow stable-lora:1 --solver RKC",
        "solver must be of another kind than RKC for StableLoRA, whose",
    ),
    ("sweep --out OUT --flow plain:1", "flow must come without a number for 'plain', got 'plain:1'"),
    ("sweep --out OUT --solver Tsit6", "solver must be 'auto', 'RKC', 'Tsit5', 'Dopri5', 'Dopri8', 'Bosh3' or"),
    ('sweep --out OUT --solver ""', "solver must be 'auto', 'RKC', 'Tsit5', 'Dopri5', 'Dopri8', 'Bosh3' or"),
    ("sweep --out OUT --rtol 0", "rtol must lie between 0 and 1, got 0.0"),
    ("sweep --out OUT --rtol -1", "rtol must lie between 0 and 1, got -1.0"),
    ("sweep --out OUT --rtol 1", "rtol must lie between 0 and 1, got 1.0"),
    ("sweep --out OUT --rtol nan", "rtol must lie between 0 and 1, got nan"),
    ("sweep --out OUT --rtol 1e-30", "rtol must be at least 2e-14 for float64 to carry it, got 1e-30"),
    ("sweep --out OUT --max-steps 0", "max_steps must be at least 1, got 0"),
    ("sweep --out OUT --max-steps -1", "max_steps must be at least 1, got -1"),
    ("sweep --out OUT --max-steps 1e20", "max_steps must be at most 2147483647, got 100000000000000000000"),
    ("sweep --out OUT --max-steps 1.5", "--max-steps must be an integer, got '1.5'"),
    ("sweep --out OUT --precision half", "precision must be 'double' or 'single', got 'half'"),
    ("sweep --out OUT --precision Double", "precision must be 'double' or 'single', got 'Double' (did you mean 'do"),
    ("sweep --out OUT --batch-size -1", "batch_size must be at least 1, or 0 for what suits the device, got -1"),
    ("sweep --out OUT --batch-size 1e20", "batch_size must be at most 2147483647, got 100000000000000000000"),
    ("sweep --out OUT --devices -1", "devices must lie between 0, for all, and 2, the number of devices, got"),
    ("sweep --out OUT --devices 3000", "devices must lie between 0, for all, and 2, the number of devices, got"),
    ("sweep --out OUT --devices 500", "devices must lie between 0, for all, and 2, the number of devices, got"),
    ("sweep --out OUT --devices 1e20", "devices must be at most 2147483647, got 100000000000000000000"),
    ("sweep --out OUT --config none.toml", "the settings file must exist, got 'none.toml'"),
    ("sweep --out OUT --config DIR", "the settings file must be a file, got"),
    ("sweep --out OUT --config /dev/null/x", "the settings file must exist, got '/dev/null/x'"),
    ("sweep --out OUT --config TOML", "must be 'init', 'side', 'alpha', 'rank', 'seeds', 't1', 'saves', 'spac"),
    ("sweep --out OUT --config GOODTOML --resume", "config must be left out with --resume, got"),
    ("sweep --out OUT --config", "Missing value for argument '--config'. Expected 1 values."),
    ("sweep --out OUT --resume", "the run folder must exist, got"),
    ("sweep --out DIR --resume", "must be a run folder, got one without settings.toml"),
    ("sweep --out OUT --resume --overwrite", "resume and overwrite must not be given together, got both"),
    ("sweep --out TEXT", "out must be a folder, got the file"),
    ("sweep --out TEXT --overwrite", "out must be a folder, got the file"),
    ("sweep --out TEXT/run", "must be a folder, got Not a directory"),
    ("sweep --out FULL", "out must be a new folder or a run folder, got"),
    ("sweep --out FULL --overwrite", "out must be a new folder or a run folder, got"),
    ("sweep --out LOOP", "must be a folder, got File exists"),
    ("sweep --out LONG", "must have a shorter name, got File name too long"),
    ("sweep --out /proc/none/run", "out must have room for 6.5 kB of results (saves 101), got 0 bytes free"),
    ("plot", "PATH must be given"),
    ("plot OUT", "the run folder must exist, got"),
    ("plot OUT OUT", "Unrecognized options:"),
    ("plot TEXT", "the run folder must exist, got"),
    ("plot DIR", "must be a run folder, got one without settings.toml"),
    ("plot LOOP", "the run folder must exist, got"),
    ("plot --out OUT", "Missing value for argument 'out'. Expected 1 values."),
    ("figure", "STR must be given"),
    ("figure 1", "--out must be given"),
    ("figure --out OUT", "STR must be given"),
    ("figure 2 --out OUT", "figure must be '1', '3', '4', 'phase', 'beyond', 'inits', 'kappa', 'sy"),
    ('figure "" --out OUT', "figure must be '1', '3', '4', 'phase', 'beyond', 'inits', 'kappa', 'sy"),
    ("figure 1 3 --out OUT", "Unrecognized options: 3"),
    ("figure 1 --out OUT --seeds 0", "seeds must be at least 1, got 0"),
    ("figure 1 --out OUT --seeds x", "--seeds must be an integer, got 'x'"),
    ("figure 1 --out OUT --seeds -3", "seeds must be at least 1, got -3"),
    ("figure 1 --out OUT --seeds 1e20", "seeds must be at most 9223372036854775807, got 100000000000000000000"),
    ("figure 1 --out OUT --resume", "the run folder must exist, got"),
    ("figure 1 --out OUT --resume --overwrite", "resume and overwrite must not be given together, got both"),
    ("figure 1 --out TEXT", "out must be a folder, got the file"),
    ("figure 1 --out FULL", "out must be a new folder or a run folder, got"),
    ("figure 3 --out FULL", "out must be a new folder or this figure's, got"),
    ("figure kappa --out LOOP", "must be a folder, got File exists"),
    ("figure scaling --out OUT --seeds 0", "seeds must lie between 1 and 10000, got 0"),
    ("figure scaling --out OUT --seeds 1e20", "seeds must lie between 1 and 10000, got 100000000000000000000"),
    ("figure scaling --out OUT --resume", "resume must be left out with figure scaling, which runs as a whole, go"),
    ("figure scaling --out FULL --overwrite", "out must be a new folder or a figure's, got"),
    ("figure scaling --out TEXT", "out must be a folder, got the file"),
    ("theory extra", "Unrecognized options: extra"),
    ("theory --seeds 2", "seeds must lie between 3, for intervals, and 1000, got 2"),
    ("theory --seeds x", "--seeds must be an integer, got 'x'"),
    ("theory --seeds 1e20", "seeds must lie between 3, for intervals, and 1000, got 100000000000000"),
    ("theory --out FULL", "out must be a new folder or one of an earlier check, got"),
    ("theory --out TEXT", "out must be a new folder or one of an earlier check, got"),
    ("inits extra", "Unrecognized options: extra"),
    ("inits --out OUT", "Unrecognized options: --out"),
    ("vision", "--out must be given"),
    ("vision --out OUT --alpha 0", "alpha must be positive and finite, got (0.0,)"),
    ("vision --out OUT --alpha 1,x", "--alpha must be a number, got 'x'"),
    ("vision --out OUT --steps 0", "steps must be at least 1, got 0"),
    ("vision --out OUT --seeds 1.5", "--seeds must be an integer, got '1.5'"),
    ("vision --out OUT --init gaussian", "init must be 'gaussian-A', 'gaussian-B', 'spectral' or 'lora-one', got"),
    ("vision --out OUT --resume", "the run folder must exist, got"),
    ("vision --out OUT --resume --overwrite", "resume and overwrite must not be given together, got both"),
    ("vision --out TEXT", "out must be a folder, got the file"),
    ("vision --out FULL", "out must be a new folder or one of an image check, got"),
    ("status", "PATH must be given"),
    ("status OUT", "the run folder must exist, got"),
    ("status TEXT", "the run folder must exist, got"),
    ("status DIR", "must be a run folder, got one without settings.toml"),
    ('sweep --out ""', "out must be a folder's name, got ''"),
    ('plot ""', "out must be a folder's name, got ''"),
    ("sweep --out OUT --alpha --resume", "--alpha must be one value or several, got ''"),
    ("sweep --out OUT --no-such", "Unrecognized options: --no-such"),
    ("sweep --out OUT --no-alpha", "Unrecognized options: --no-alpha (did you mean --alpha?)"),
    ("sweep --out OUT ---", "Unrecognized options: --- (did you mean --"),
    ("sweep -- --out OUT", "--out must be given"),
    ("sweep --out OUT --side=", "--side must be one value or several, got ''"),
    ("sweep --out OUT --init=spectral,,gaussian", "--init must be one value or several, got 'spectral,,gaussian'"),
    ("figure 1 --out OUT --alpha 1", "Unrecognized options: --alpha, 1"),
    ("theory --out OUT --resume", "Unrecognized options: --resume"),
    ("plot OUT --resume", "Unrecognized options: --resume"),
    ("theory --out LOOP", "must be a folder, got File exists"),
]

FILES = {
    "OUT": "out",
    "SHAPES": "shapes.npz",
    "NAN": "nan.npz",
    "NAMES": "names.npz",
    "OBJECTS": "objects.npz",
    "GOOD": "good.npz",
    "EMPTYNPZ": "empty.npz",
    "CUTNPZ": "cut.npz",
    "BADNPZ": "bad.npz",
    "BROKENST": "broken.safetensors",
    "TOML": "bad.toml",
    "GOODTOML": "good.toml",
    "TEXT": "text.txt",
    "DIR": "dir.d",
    "FULL": "full",
    "LOOP": "loop.d",
    "LONG": "x" * 300,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of every wrong kind, and a right one."""
    folder = tmp_path_factory.mktemp("wrong")
    square, wide = np.ones((3, 2)), np.ones((2, 3))
    np.savez(folder / "shapes.npz", w1=square, w2=np.ones((2, 4)), shift=np.ones((2, 2)))
    np.savez(folder / "nan.npz", w1=square, w2=wide, shift=np.array([[1, np.nan], [0, 1]]))
    np.savez(folder / "names.npz", a=np.ones(2))
    np.savez(folder / "objects.npz", w1=np.array([{}], dtype=object), w2=wide, shift=np.ones((2, 2)))
    np.savez(folder / "good.npz", w1=square, w2=wide, shift=np.ones((2, 2)))
    good = (folder / "good.npz").read_bytes()
    (folder / "empty.npz").write_bytes(b"")
    (folder / "cut.npz").write_bytes(good[: len(good) // 2])
    (folder / "bad.npz").write_bytes(good.replace(np.ones(6).tobytes(), np.full(6, 2.0).tobytes()))
    (folder / "broken.safetensors").write_bytes(b"\xff" * 100)
    (folder / "text.txt").write_text("text")
    (folder / "bad.toml").write_text("alpa = [1e-3]\n")
    (folder / "good.toml").write_text("alpha = [1e-3]\n")
    (folder / "full").mkdir()
    (folder / "full" / "thesis.tex").write_text("years of work")
    (folder / "dir.d").mkdir()
    (folder / "loop.d").symlink_to(folder / "loop.d")
    return folder


@pytest.mark.parametrize(("line", "message"), COMMAND_LINES)
def test_wrong_command_lines(line, message, folder, refused, monkeypatch):
    monkeypatch.chdir(folder)
    before = sorted(os.listdir(folder))
    words = []
    for word in shlex.split(line):
        name, slash, rest = word.partition("/")
        words.append(f"{folder / FILES[name]}{slash}{rest}" if name in FILES else word)
    assert message in refused(words)
    assert sorted(os.listdir(folder)) == before


@pytest.mark.parametrize("name", ["EMPTYNPZ", "CUTNPZ", "BADNPZ", "OBJECTS", "NAMES", "BROKENST"])
def test_a_file_that_is_refused_is_closed(name, folder, refused):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", ResourceWarning)
        refused(["sweep", "--out", str(folder / "out"), "--problem", str(folder / FILES[name])])
        gc.collect()
    assert not found
