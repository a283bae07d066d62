"""Every error of the configuration, by its exact words: key, value, rule and remedy."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from typing import ClassVar

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir

from deepseek_exp import config
from deepseek_exp.config import Device, Do, compose, machine
from deepseek_exp.config.rules import bounds, validate, values
from deepseek_exp.errors import ConfigError
from deepseek_exp.experiment import command_line, init_from
from deepseek_exp.experiment.job import make_job
from tests.config.test_config import composed
from tests.runs import ROOT

MESSAGES = {
    "optim.lrr=1": "optim.lrr=1 is not a configuration key. "
    "Fix: did you mean optim.lr? Otherwise see python run.py --help for all keys.",
    "lr=1": "lr=1 is not a configuration key. "
    "Fix: did you mean optim.lr? Otherwise see python run.py --help for all keys.",
    "trainer.eval_batches=4": "trainer.eval_batches=4 is not a configuration key. Fix: set trainer.eval_seqs, the "
    "sequences of one validation: trainer.eval_batches times trainer.micro_batch_seqs.",
    "xyzzy=1": "xyzzy=1 is not a configuration key. Fix: see python run.py --help for all keys.",
    "+optim.momentum=1": "optim.momentum=1 is not a configuration key. "
    "Fix: did you mean optim.optimizer? Otherwise remove it.",
    "++foo=1": "foo=1 is not a configuration key. Fix: remove it.",
    "model=v1_dens": "model='v1_dens' is not an option of the group model. Fix: use model=v1_dense.",
    "size=enormous": "size='enormous' is not an option of the group size. "
    "Fix: use one of 175b, 1b, 3b, 70b, 7b, base, published, small, tiny.",
    "recipes=nothing_like_it": "recipes='nothing_like_it' is not an option of the group recipes. "
    "Fix: use one of balance, domains, domains_dense, equal_flops/v1_dense, equal_flops/v2_5_sparse, "
    "equal_flops/v2_moe, equal_flops/v3_moe, equal_flops/v5_domain_moe, scaled_lr, shakespeare.",
    "hydra/launcher=basicc": "hydra/launcher='basicc' is not an option of the group hydra/launcher. "
    "Fix: use hydra/launcher=basic.",
    "do=trian": "do='trian' is not one of train, eval, sample, export, plan, verify. Fix: use do=train.",
    "device=tpu": "device='tpu' is not one of auto, cpu, cuda. Fix: use device=cpu.",
    "optim.lr=abc": "optim.lr='abc' is not a number. Fix: use a number, for example optim.lr=0.003.",
    "seed=x": "seed='x' is not a whole number. Fix: use a whole number, for example seed=1234.",
    "trainer.compile=maybe": "trainer.compile='maybe' is not true or false. "
    "Fix: use true or false, for example trainer.compile=false.",
    "tracking.tags=x": "tracking.tags='x' is not a mapping. Fix: use a mapping, for example tracking.tags={}.",
    "model.rope_theta=null": "model.rope_theta=null is not a number. "
    "Fix: use a number, for example model.rope_theta=10000.0.",
    "~optim": "optim=null cannot be deleted: it is what an experiment takes one option from. "
    "Fix: use one of adafactor, adamw, adamw_scaled.",
    "output_dir=${nope}": "output_dir='${nope}' cannot be resolved (Interpolation key 'nope' not found). "
    "Fix: correct the reference.",
    "optim.lr=[1": "command line='optim.lr=[1' cannot be parsed. "
    "Fix: write key=value; quote a value with special characters, as in 'sample.prompt=\"a, b\"'.",
    "model.n_heads=2,4": "model.n_heads='2,4' has several values without -m. Fix: add -m for a sweep.",
    "trainer.callbacks.stop={a:1}": "trainer.callbacks.stop={'a': 1} adds an entry, which needs a plus sign. "
    "Fix: write +trainer.callbacks.stop={a:1}.",
    "+trainer.callbacks.stop={_target_:os.system}": "trainer.callbacks.stop._target_='os.system' is not a class "
    "of the modules that a configuration may name (torch.optim, pytorch_lightning.callbacks, "
    "deepseek_exp.train.callbacks). Fix: use a class of those modules.",
    "+trainer.callbacks.stop={a:1}": "trainer.callbacks.stop={'a': 1} has no _target_. "
    "Fix: set trainer.callbacks.stop._target_ to a class.",
    "model.n_heads=0": "model.n_heads=0 must be at least 1. Fix: use 1 or more.",
    "optim.lr=-1": "optim.lr=-1.0 must be greater than 0. Fix: use more than 0.",
    "sample.top_p=1.5": "sample.top_p=1.5 must be at most 1. Fix: use 1 or less.",
    "data.valid_fraction=1.0": "data.valid_fraction=1.0 must be at most 0.99. Fix: use 0.99 or less.",
    "model=v3_moe size=tiny model.kv_lora_rank=0": (
        "model.kv_lora_rank=0 must be at least 1 for mla. Fix: set model.kv_lora_rank=16."
    ),
    "model=v3_moe size=tiny model.qk_rope_head_dim=7": (
        "model.qk_rope_head_dim=7 is odd, and the rotary embedding turns pairs. Fix: use 8."
    ),
    "model=v3_moe size=tiny model.qkv_bias=true": (
        "model.qkv_bias=true is for model.attention='gqa' and not for 'mla'. Fix: set model.qkv_bias=false."
    ),
    "model.rope_scaling.factor=2": (
        "model.rope_scaling.factor=2.0 does nothing while model.rope_scaling.kind='none'. Fix: set "
        "model.rope_scaling.kind=yarn, or the factor to 1."
    ),
    "model.rope_scaling.low_freq_factor=9": (
        "model.rope_scaling.low_freq_factor=9.0 must be less than model.rope_scaling.high_freq_factor=4. "
        "Fix: use 1 and 4."
    ),
    "model.d_ff_active=9999": (
        "model.d_ff_active=9999 is more than model.d_ff=512. Fix: use 512 or less; 0 keeps all."
    ),
    "model=v3_moe size=tiny model.n_mtp_layers=64": (
        "model.n_mtp_layers=64 leaves data.seq_len=64 nothing to predict. Fix: use 63 or less."
    ),
    "model.moe.n_shared_experts=1": (
        "model.moe.n_shared_experts=1 does nothing while model.moe.n_routed_experts=0. Fix: set "
        "model.moe.n_routed_experts, or model.moe.n_shared_experts=0."
    ),
    "model.moe.domains=[a,b]": (
        "model.moe.domains=['a', 'b'] does nothing while model.moe.n_routed_experts=0. Fix: set "
        "model.moe.n_routed_experts, or model.moe.domains=[]."
    ),
    "model.moe.capacity_factor=1.5": (
        "model.moe.capacity_factor=1.5 does nothing while model.moe.n_routed_experts=0. Fix: set "
        "model.moe.n_routed_experts, or model.moe.capacity_factor=0."
    ),
    "model.moe.balance=bias model.moe.sequence_loss_weight=0.1": (
        "model.moe.balance='bias' does nothing while model.moe.n_routed_experts=0. Fix: set "
        "model.moe.n_routed_experts, or model.moe.balance=none.\n"
        "model.moe.sequence_loss_weight=0.1 does nothing while model.moe.n_routed_experts=0. Fix: set "
        "model.moe.n_routed_experts, or model.moe.sequence_loss_weight=0."
    ),
    "model=v2_moe size=tiny model.d_ff_active=64": (
        "model.d_ff_active=64 does nothing while model.moe.n_dense_layers=0 makes every block a mixture of experts. "
        "Fix: set model.d_ff_active=0, or model.moe.n_dense_layers."
    ),
    "model=v2_moe size=tiny model.moe.top_k=17": (
        "model.moe.top_k=17 must be from 1 to model.moe.n_routed_experts=16. Fix: use model.moe.top_k=2.\n"
        "model.moe.top_k=17 is more than the 8 experts of model.moe.top_k_groups=2 groups. Fix: lower it, "
        "or raise model.moe.top_k_groups."
    ),
    "model=v2_moe size=tiny model.moe.top_k=1": (
        "model.moe.norm_top_k=true makes every weight 1 with model.moe.top_k=1, so that the router learns "
        "nothing. Fix: set model.moe.norm_top_k=false."
    ),
    "model=v2_moe size=tiny model.moe.d_expert=20": (
        "model.moe.d_expert=20 is not a multiple of 8, which the experts' matrix products need. Fix: use "
        "model.moe.d_expert=16."
    ),
    "model=v2_moe size=tiny model.moe.n_dense_layers=2": (
        "model.moe.n_dense_layers=2 leaves none of model.n_layers=2 to the experts. Fix: use 1 or less."
    ),
    "model=v2_moe size=tiny model.moe.n_groups=0": "model.moe.n_groups=0 must be at least 1. Fix: use 1 or more.",
    "hydra/sweeper=[]": (
        "hydra/sweeper=[] has no option. Fix: choose one, such as hydra/sweeper=basic, or leave hydra/sweeper out."
    ),
    "model=v2_moe size=tiny model.moe.n_groups=3": (
        "model.moe.n_groups=3 does not divide model.moe.n_routed_experts=16. Fix: use one of 1, 2, 4, 8, 16."
    ),
    "model=v2_moe size=tiny model.moe.top_k_groups=5": (
        "model.moe.top_k_groups=5 is more than model.moe.n_groups=4. Fix: use 4 or less."
    ),
    "model=v2_moe size=tiny model.moe.top_k=9": (
        "model.moe.top_k=9 is more than the 8 experts of model.moe.top_k_groups=2 groups. Fix: lower it, "
        "or raise model.moe.top_k_groups."
    ),
    "model=v2_moe size=tiny model.moe.n_groups=16 model.moe.group_score=top2_sum": (
        "model.moe.group_score='top2_sum' needs two experts in a group and model.moe.n_groups=16 leaves 1. "
        "Fix: use model.moe.group_score=max."
    ),
    "model=v5_domain_moe size=tiny model.moe.domains=[a]": (
        "model.moe.domains=['a'] must be two different names or more. Fix: name each domain once."
    ),
    "model=v5_domain_moe size=tiny model.moe.domains=[a,b,c]": (
        "model.moe.domains=['a', 'b', 'c'] does not share model.moe.n_routed_experts=8 evenly. Fix: use a "
        "multiple of 3 experts."
    ),
    "model=v5_domain_moe size=tiny model.moe.top_k=3": (
        "model.moe.top_k=3 is more than the 2 experts of the domain general. Fix: lower it, or raise "
        "model.moe.n_routed_experts."
    ),
    "model=v5_domain_moe size=tiny model.moe.n_groups=2": (
        "model.moe.n_groups=2 cannot be used with model.moe.domains, which narrow the choice already. Fix: "
        "set model.moe.n_groups=1."
    ),
    "model=v5_domain_moe size=tiny model.moe.capacity_factor=1.25": (
        "model.moe.capacity_factor=1.25 cannot be used with model.moe.domains: it bounds by the mean over all domains, "
        "whose texts differ in amount. Fix: set model.moe.capacity_factor=0."
    ),
    "model=v5_domain_moe size=tiny model.moe.balance=aux_loss": (
        "model.moe.balance='aux_loss' would even out the load across model.moe.domains, whose texts differ "
        "in amount. Fix: set model.moe.balance=bias."
    ),
    "model=v5_domain_moe size=tiny model.moe.sequence_loss_weight=0.1": (
        "model.moe.sequence_loss_weight=0.1 would even out the load across model.moe.domains, whose texts "
        "differ in amount. Fix: set model.moe.sequence_loss_weight=0."
    ),
    "model=v5_domain_moe size=tiny data=mixture +data.mixture.sports.path=README.md": (
        "data.mixture='sports' is not one of model.moe.domains=['general', 'finance', 'medical', 'law']. "
        "Fix: name the parts of the mixture after the domains."
    ),
    "model=v5_domain_moe size=tiny sample.domain=sports": (
        "sample.domain='sports' is not one of model.moe.domains=['general', 'finance', 'medical', 'law']. "
        "Fix: use one of general, finance, medical, law."
    ),
    "sample.domain=law": ("sample.domain='law' is not one of model.moe.domains=[]. Fix: leave it out."),
    "model.n_kv_heads=4": "model.n_kv_heads=4 does not divide model.n_heads=6. "
    "Fix: use model.n_kv_heads of 1, 2, 3, 6.",
    "model.head_dim=31": "model.head_dim=31 is odd, and the rotary embedding turns pairs. Fix: use model.head_dim=32.",
    "data.seq_len=4096": "data.seq_len=4096 is longer than model.max_seq_len=256. "
    "Fix: set data.seq_len=256 or less, or raise model.max_seq_len.",
    "model.memory_len=63": "model.memory_len=63 needs each sequence to go on where the one before ended, and "
    "data.order is 'shuffled'. Fix: set data.order=contiguous, or model.memory_len=0.",
    "model.memory_len=64 model.window=0 data.order=contiguous": "model.memory_len=64 needs a local window: without one "
    "the memory would be the whole past. Fix: set model.window to a length, or model.memory_len=0.",
    "data.vocab_size=9999": "data.vocab_size=9999 is more than model.vocab_size=4096. "
    "Fix: set data.vocab_size=4096 or less.",
    "trainer.global_batch_seqs=-1": "trainer.global_batch_seqs=-1 must be at least 1. Fix: use 1 or more.",
    "trainer.micro_batch_seqs=5": "trainer.micro_batch_seqs=5 does not divide trainer.global_batch_seqs=8. "
    "Fix: use trainer.micro_batch_seqs=4.",
    "optim.warmup_steps=100 trainer.max_steps=100": "optim.warmup_steps=100 leaves no step of trainer.max_steps=100 at "
    "full learning rate. Fix: set optim.warmup_steps=10, or train for more steps.",
    "data=text": "data.path=null is needed for data.source='text'. "
    "Fix: set data.path to a file, folder or glob of .txt .md .jsonl .jsonl.gz .parquet.",
    "data.path=/nowhere": "data.path='/nowhere' is not read by data.source='stdlib'. Fix: add data=text.",
    "data=synthetic data.max_bytes=null": "data.max_bytes=null is needed for data.source='synthetic'. "
    "Fix: set data.max_bytes=300000.",
    "data=mixture": "data.mixture={} has no part, and data.source='mixture' needs one at least. "
    "Fix: add +data.mixture.<name>.path=<file, folder or glob> +data.mixture.<name>.weight=1 for each part.",
    "+data.mixture.a.path=/": "data.mixture='a' has parts, and data.source='stdlib' reads none. "
    "Fix: add data=mixture, or leave the parts out.",
    "data=mixture data.mixture.a.path=/": "data.mixture.a.path='/' adds an entry, which needs a plus sign. "
    "Fix: write +data.mixture.a.path=/.\n"
    "data.mixture={} has no part, and data.source='mixture' needs one at least. "
    "Fix: add +data.mixture.<name>.path=<file, folder or glob> +data.mixture.<name>.weight=1 for each part.",
    "data=mixture +data.mixture.a.path=/ data.path=/": "data.path='/' is not read by data.source='mixture'. "
    "Fix: set data.path=null and give each part its own, as in +data.mixture.<name>.path=/.",
    "data=mixture +data.mixture.a.path=/ data.valid_path=/": "data.valid_path='/' is not read by "
    "data.source='mixture'. Fix: set data.valid_path=null and give each part its own, as in "
    "+data.mixture.<name>.valid_path=/.",
    "data=mixture +data.mixture.a.path=/ data.order=contiguous": "data.order='contiguous' cannot be used with "
    "data.source='mixture', whose neighbours in a lane are of different texts. "
    "Fix: set data.order=shuffled, or train on one text.",
    "data=mixture +data.mixture={a/b:{path:/}}": "data.mixture='a/b' is not a name of letters, digits, _ and -, which "
    "metrics and keys are named with. Fix: rename the part.",
    "data=mixture +data.mixture.a.path=/ +data.mixture.a.wight=1": "data.mixture.a.wight=1 is not a key of a part "
    "(path, valid_path, weight). Fix: correct the name or remove it.",
    "data=mixture +data.mixture.a=/": "data.mixture.a='/' is not a part, which has the keys path, valid_path, weight. "
    "Fix: write +data.mixture.a.path=<file, folder or glob>.",
    "data=mixture +data.mixture.a.weight=1": "data.mixture.a.path=null has no value. "
    "Fix: add +data.mixture.a.path=<file, folder or glob>.",
    "data=mixture +data.mixture.a.path=null": "data.mixture.a.path=null has no value. "
    "Fix: add +data.mixture.a.path=<file, folder or glob>.",
    "data=mixture +data.mixture.a.path=7": "data.mixture.a.path=7 is not a text. Fix: name a file, folder or glob.",
    "data=mixture +data.mixture.a.path=/ +data.mixture.a.weight=x": "data.mixture.a.weight='x' is not a number. "
    "Fix: use a number, for example data.mixture.a.weight=1.",
    "data=mixture +data.mixture.a.path=/ +data.mixture.a.weight=true": "data.mixture.a.weight=true is not a number. "
    "Fix: use a number, for example data.mixture.a.weight=1.",
    "data=mixture +data.mixture.a.path=/ +data.mixture.a.weight=0": "data.mixture.a.weight=0 must be greater than 0. "
    "Fix: use more than 0.",
    "data=mixture +data.mixture.a.path=/ +data.mixture.a.weight=inf": "data.mixture.a.weight=inf is not a finite "
    "number. Fix: use a number.",
    "optim.optimizer._target_=torch.optim.adam.torch.hub.load": "optim.optimizer._target_="
    "'torch.optim.adam.torch.hub.load' is not a class of the modules that a configuration may name "
    "(torch.optim, pytorch_lightning.callbacks, deepseek_exp.train.callbacks). Fix: use a class of those modules.",
    "resume=": "resume='' is empty. Fix: set resume=null, or leave resume out.",
    "output_dir=": "output_dir='' is empty. Fix: leave output_dir out.",
    "data=text data.path=": "data.path='' is empty. Fix: set data.path=null, or leave data.path out.",
    "model.version=": "model.version='' is empty. Fix: leave model.version out.",
    "do=": "do='' is not one of train, eval, sample, export, plan, verify. "
    "Fix: use one of train, eval, sample, export, plan, verify.",
    "device=gpu": "device='gpu' is not one of auto, cpu, cuda. Fix: use device=cuda.",
    "model=v3": "model='v3' is not an option of the group model. Fix: use model=v3_moe.",
    "steps=5": "steps=5 is not a configuration key. "
    "Fix: did you mean trainer.max_steps? Otherwise see python run.py --help for all keys.",
    "data.path=[a,b]": "data.path=['a', 'b'] is a list and not a text. Fix: name one file or folder, a glob such as "
    "texts/**/*.txt, or several texts with data=mixture.",
    "data.path=~/x": "command line='data.path=~/x' cannot be parsed. Fix: quote the value: 'data.path=\"~/x\"'.",
    "trainer.callbacks={a:{_target_:x}}": "trainer.callbacks={'a': {'_target_': 'x'}} adds entries, which need a plus "
    "sign. Fix: write +trainer.callbacks={a:{_target_:x}}.",
    "+tracking.tags.x=null": "tracking.tags.x=null is not a text. Fix: use a text, for example +tracking.tags.x=x.",
    "+tracking.tags={../x:1}": "tracking.tags='../x' is not a name of letters, digits and _-./: within 250 characters, "
    "which MLflow asks for. Fix: rename the tag.",
    "optim.optimizer=${seed}": "optim.optimizer=1234 is not a mapping. "
    "Fix: leave optim.optimizer out; +optim.optimizer.<name>=... adds an entry.",
    "trainer.compile=1000": "trainer.compile=1000 is not true or false. "
    "Fix: use trainer.compile=true or trainer.compile=false.",
    "optim=5": "optim=5 is not an option of the group optim. Fix: use one of adafactor, adamw, adamw_scaled.",
    "tracking.run_name=" + "x" * 300: "tracking.run_name='"
    + "x" * 180
    + "... (300 characters)' has 300 characters, and "
    "at most 250 are kept. Fix: use a shorter name; sample text and notes fit into +tracking.tags.note=....",
    "export.path=" + "x" * 256: "export.path='" + "x" * 180 + "... (256 characters)' has a name of 256 bytes, and file "
    "systems take 255. Fix: use shorter names.",
    "optim.lr=1" + "0" * 400: "optim.lr=a number of 401 digits is beyond the largest number, 1.8e308. "
    "Fix: use a smaller number.",
    "tracking.uri='http://['": "tracking.uri='http://[' is no address. Fix: use the form http://host:port.",
    "tracking.uri='http://a:p[w]@h'": "tracking.uri='http://a:***@h' is no address. Fix: use the form http://host:port.",
    "tracking.uri='http:/a:pw@h'": "tracking.uri='***@h' has no scheme of sqlite, http, https, postgresql, mysql, "
    "mssql (MLflow's file store is gone). "
    "Fix: set tracking.uri=sqlite:///outputs/mlflow.db or a server's http address.",
    "tracking.uri=sqlite:///": "tracking.uri='sqlite:///' names no file. "
    "Fix: use the form sqlite:///folder/file.db; an absolute path makes it four slashes.",
    "tracking.uri=sqlite:////tmp": "tracking.uri='sqlite:////tmp' is a folder and not a file. "
    "Fix: use the form sqlite:///folder/file.db; an absolute path makes it four slashes.",
    "output_dir='a?b'": "tracking.uri='sqlite:///a?b/mlflow.db' is read as the file 'sqlite:///a' with options, since "
    "a `?` begins options. Fix: use a path, and an output_dir, without `?`.",
    "trainer.global_batch_seqs=1000000000000": "trainer.global_batch_seqs=1000000000000 must be at most 1,000,000. "
    "Fix: use 1,000,000 or less.",
    "model.n_heads=9223372036854775807": "model.n_heads=9223372036854775807 must be at most 65,536. "
    "Fix: use 65,536 or less.",
    "data.n_workers=9223372036854775808": "data.n_workers=9223372036854775808 must be at most 256. "
    "Fix: use 256 or less.",
    "trainer.n_threads=100000": "trainer.n_threads=100000 must be at most 1,024. Fix: use 1,024 or less.",
    "cluster.memory_bandwidth=1e-320": "cluster.memory_bandwidth=1e-320 must be at least 1. Fix: use 1 or more.",
    "optim.weight_decay=1e308": "optim.weight_decay=1e+308 must be at most 1,000. Fix: use 1,000 or less.",
    "sample.temperature=1e-320": "sample.temperature=1e-320 must be 0 or at least 1e-06. "
    "Fix: use 0 for the most likely token.",
    "model.moe.top_k=2": "model.moe.top_k=2 does nothing while model.moe.n_routed_experts=0. "
    "Fix: leave model.moe.top_k out.",
    "model.qk_rope_head_dim=8": "model.qk_rope_head_dim=8 does nothing while model.attention='gqa'. "
    "Fix: leave model.qk_rope_head_dim out.",
    "optim.lr=inf": "optim.lr=inf is not a finite number. Fix: use a number.",
    "model.norm_eps=1": "model.norm_eps=1.0 must be less than 1. Fix: use less than 1.",
    "resume='~nobody-of-this-name/x'": "resume='~nobody-of-this-name/x' begins with ~, which a shell replaces and this "
    "key does not. Fix: use resume=~nobody-of-this-name/x.",
    "data=mixture +data.mixture.a.path=" + "x" * 256: "data.mixture.a.path='"
    + "x" * 180
    + "... (256 characters)' has a name of 256 bytes, and file systems take 255. Fix: use shorter names.",
    "tracking.uri=sqlite:///" + "x" * 256: "tracking.uri='" + "x" * 180 + "... (256 characters)' has a name of 256 "
    "bytes, and file systems take 255. Fix: use shorter names.",
    "resume=" + "a/" * 2001: "resume='"
    + "a/" * 90
    + "... (4,002 characters)' has 4,002 bytes, and a path has 4,000 at most. Fix: use a shorter path.",
    "model.memory_len=64 data.order=contiguous": "model.memory_len=64 is more than a query of model.window=64 "
    "sees of it. Fix: set model.memory_len=63 or less.",
    "model.memory_len=9 data.order=contiguous trainer.compile=true": "trainer.compile=true does not reach the "
    "segments of a model with model.memory_len=9. Fix: set trainer.compile=false, or model.memory_len=0.",
    "-m ++resume=last": "resume='a sweep' cannot be combined with -m. Fix: resume one run at a time, without -m.",
    "optim.optimizer.betas=[${nope},1]": "optim.optimizer.betas[0]=['${nope}', 1] cannot be resolved "
    "(Interpolation key 'nope' not found). Fix: correct the reference.",
    "tracking.uri='sqlite:///a?b/m.db'": "tracking.uri='sqlite:///a?b/m.db' is read as the file 'sqlite:///a' with "
    "options, since a `?` begins options. Fix: use a path, and an output_dir, without `?`.",
    "tracking.uri='ftp://alice:pw@h'": "tracking.uri='ftp://alice:***@h' has no scheme of sqlite, http, https, "
    "postgresql, mysql, mssql (MLflow's file store is gone). "
    "Fix: set tracking.uri=sqlite:///outputs/mlflow.db or a server's http address.",
    "tracking.uri=outputs": "tracking.uri='outputs' has no scheme of sqlite, http, https, postgresql, mysql, mssql "
    "(MLflow's file store is gone). "
    "Fix: set tracking.uri=sqlite:///outputs/mlflow.db or a server's http address.",
    "cluster=h100_2": "cluster='h100_2' is not an option of the group cluster. Fix: use cluster=h100_8.",
    "parallel=3d cluster=h100_1 device=cpu trainer.global_batch_seqs=9": "trainer.global_batch_seqs=9 is not a "
    "multiple of trainer.micro_batch_seqs=1 x parallel.dp=2. Fix: use trainer.global_batch_seqs=10.",
    "launch=torchrun launch.n_nodes=3 parallel=3d": "launch.n_nodes=3 does not share 8 ranks evenly. "
    "Fix: use one of 1, 2, 4, 8.",
    "launch=slurm launch.n_nodes=2 launch.ranks_per_node=8 parallel=3d": "launch.ranks_per_node=8 and "
    "launch.n_nodes=2 make 16 ranks, and parallel asks for 8. Fix: use launch.ranks_per_node=4, or 0.",
    "launch.n_nodes=2 parallel=3d device=cpu": "launch.n_nodes=2 is not read by launch.launcher='local'. "
    "Fix: add launch=torchrun or launch=slurm, or leave launch.n_nodes out.",
    "launch=torchrun launch.account=me": "launch.account='me' is not read by launch.launcher='torchrun'. "
    "Fix: add launch=slurm, or leave launch.account out.",
    "parallel.tp=-1 do=plan": "parallel.tp=-1 must be at least 0. Fix: use 0 or more.",
    "parallel.tp=4 do=plan": "parallel.tp=4 does not divide model.n_heads=6. Fix: use parallel.tp of 1, 2.",
    "size=base model.n_kv_heads=2 model.n_heads=12 parallel.tp=3 do=plan": "parallel.tp=3 neither divides "
    "model.n_kv_heads=2 nor is a multiple of it. Fix: use parallel.tp of 1, 2, 4.",
    "model.d_ff=513 parallel.tp=2 do=plan": "parallel.tp=2 does not divide model.d_ff=513. Fix: use parallel.tp of 1.",
    "model=v2_moe size=tiny model.moe.d_expert=8 model.n_heads=16 parallel.tp=16 cluster=h100_1024 do=plan": (
        "parallel.tp=16 does not divide model.moe.d_expert=8. Fix: use parallel.tp of 1, 2, 4, 8."
    ),
    "model.vocab_size=4095 parallel.tp=2 do=plan": "parallel.tp=2 does not divide model.vocab_size=4095. "
    "Fix: use parallel.tp of 1.",
    "parallel.pp=5 parallel.zero_stage=1 do=plan": "parallel.pp=5 is more than model.n_layers=4. Fix: "
    "use parallel.pp=4 or less.",
    "parallel.dp=2 parallel.ep=2 trainer.micro_batch_seqs=1 do=plan": "parallel.ep=2 has no experts to share out: "
    "model.moe.n_routed_experts=0. Fix: use parallel.ep of 1.",
    "model=v2_moe size=tiny parallel=3d parallel.dp=6 parallel.tp=1 parallel.pp=1 parallel.ep=6 "
    "trainer.global_batch_seqs=6 do=plan": "parallel.ep=6 does not divide model.moe.n_routed_experts=16. "
    "Fix: use parallel.ep of 1, 2.",
    "model=v2_moe size=tiny parallel=3d parallel.ep=4 do=plan": "parallel.ep=4 does not divide parallel.dp=2. "
    "Fix: use parallel.ep of 1, 2.",
    "parallel=3d parallel.zero_stage=3 do=plan": "parallel.zero_stage=3 cannot be used with parallel.pp=2 (a DeepSpeed "
    "pipeline refuses ZeRO 2 and 3, and with 0 its clipping misses the later stages' norms). "
    "Fix: set parallel.zero_stage=1, or parallel.pp=1.",
    "parallel=3d parallel.zero_stage=0 do=plan": "parallel.zero_stage=0 cannot be used with parallel.pp=2 (a DeepSpeed "
    "pipeline refuses ZeRO 2 and 3, and with 0 its clipping misses the later stages' norms). "
    "Fix: set parallel.zero_stage=1, or parallel.pp=1.",
    "parallel.dp=2 do=plan": "trainer.global_batch_seqs=8 is not a multiple of trainer.micro_batch_seqs=8 x "
    "parallel.dp=2. Fix: use trainer.global_batch_seqs=16, or trainer.micro_batch_seqs of 1, 2, 4.",
    "parallel=3d trainer.global_batch_seqs=9 do=plan": "trainer.global_batch_seqs=9 is not a multiple of "
    "trainer.micro_batch_seqs=1 x parallel.dp=2. Fix: use trainer.global_batch_seqs=10.",
    "parallel=3d cluster=h100_1 do=plan": "parallel.dp=2 makes 8 ranks (dp=2 x tp=2 x pp=2) and the cluster has 1. "
    "Fix: lower parallel.dp, parallel.tp or parallel.pp to 1 ranks or less, or take a larger cluster.",
    "parallel.dp=0 parallel.pp=0 do=plan": "parallel.pp=0 is auto as parallel.dp is, and one alone can follow from the "
    "others. Fix: set parallel.pp=1; parallel=auto takes the fastest layout.",
    "parallel.dp=0 parallel.tp=3 do=plan": "parallel.dp=0 cannot be worked out: 3 x 1 does not divide 8 ranks of the "
    "cluster. Fix: lower parallel.tp and parallel.pp, or set parallel.dp.",
    "parallel=auto parallel.tp=2": "parallel.tp=2 cannot be used with parallel.auto=true, which chooses it. "
    "Fix: leave parallel.tp out, or set parallel.auto=false.",
    "model=v3_moe parallel=3d trainer.compile=true trainer.activation_checkpointing=full do=plan": "trainer.compile="
    "true compiles no block that is computed again (trainer.activation_checkpointing) with parallel.ep=2. "
    "Fix: set trainer.compile=false, or trainer.activation_checkpointing=none.",
    "parallel=zero3 parallel.dp=2 trainer.micro_batch_seqs=4 trainer.compile=true do=plan": "trainer.compile=true "
    "cannot be used with parallel.zero_stage=3 (weights come and go inside of what is compiled). "
    "Fix: set trainer.compile=false, or parallel.zero_stage=1.",
    "parallel=3d model.memory_len=63 data.order=contiguous do=plan": "model.memory_len=63 cannot be used with 8 ranks: "
    "the memory of a segment lies on one. Fix: set model.memory_len=0, or parallel=single.",
    "parallel=3d parallel.pp=1 parallel.zero_stage=2 do=plan": "parallel.zero_stage=2 cannot be used with "
    "parallel.tp=2 (it cuts gradients while they are made, before they can be summed over tp and ep). "
    "Fix: set parallel.zero_stage=1, or parallel.tp=1.",
    "model=v2_moe size=tiny parallel=zero3 parallel.ep=2 trainer.micro_batch_seqs=1 do=plan": (
        "parallel.zero_stage=3 cannot be used with parallel.ep=2 (it cuts gradients while they are made, before they "
        "can be summed over tp and ep). Fix: set parallel.zero_stage=1, or parallel.ep=1."
    ),
    "parallel=zero2 optim=adafactor trainer.micro_batch_seqs=1 do=plan": "optim.optimizer._target_="
    "'torch.optim.Adafactor' cannot be used with parallel.zero_stage=2 on 8 ranks (ZeRO cuts flattened parameters, and "
    "this class may need whole ones). Fix: use one of torch.optim.{AdamW, Adam, SGD, RMSprop, NAdam, "
    "RAdam, Adamax}, or parallel.zero_stage=0.",
    "parallel=3d optim=adafactor do=plan": "optim.optimizer._target_="
    "'torch.optim.Adafactor' cannot be used with parallel.zero_stage=1 on 8 ranks (ZeRO cuts flattened parameters, and "
    "this class may need whole ones). Fix: use one of torch.optim.{AdamW, Adam, SGD, RMSprop, NAdam, "
    "RAdam, Adamax}.",
    "kernels=fused optim=adafactor do=plan": "kernels.adamw='triton' does what torch.optim.AdamW does with betas and "
    "eps, and is asked for torch.optim.Adafactor. Fix: set kernels.adamw=torch, or optim=adamw.",
    "kernels=fused +optim.optimizer.amsgrad=true do=plan": "kernels.adamw='triton' does what torch.optim.AdamW does "
    "with betas and eps, and is asked for torch.optim.AdamW with amsgrad. Fix: set kernels.adamw=torch, or "
    "optim=adamw.",
    "optim.state_bits=8 do=plan": "optim.state_bits=8 needs kernels.adamw='triton'. Fix: set kernels.adamw=triton, or "
    "32.",
    "optim.state_bits=16 do=plan": "optim.state_bits=16 must be 8 or 32. Fix: use 32, or 8 to save memory.",
    "kernels=fused optim.state_bits=8 parallel.tp=2 do=plan": "optim.state_bits=8 is for one process, and this layout "
    "has 2 ranks, whose checkpoints hold fp32 moments. Fix: set optim.state_bits=32, or parallel=single.",
    "do=plan sample.weight_bits=8": "sample.weight_bits=8 is for do=sample. Fix: set sample.weight_bits=0.",
    "do=plan sample.weight_bits=3": "sample.weight_bits=3 must be 0, 4 or 8. Fix: use 8, or 0 for weights as they are.",
    "parallel.tp=2 optim=adafactor do=plan": "optim.optimizer._target_="
    "'torch.optim.Adafactor' cannot be used with parallel.tp=2 on 2 ranks (a rank has a part of a matrix, and "
    "this class may need whole ones). Fix: use one of torch.optim.{AdamW, Adam, SGD, RMSprop, NAdam, "
    "RAdam, Adamax}.",
    "parallel.sequence_parallel=true do=plan": "parallel.sequence_parallel=true has no tensor ranks to cut a sequence "
    "over: parallel.tp=1. Fix: set parallel.sequence_parallel=false, or parallel.tp.",
    "parallel=3d parallel.sequence_parallel=true data.seq_len=255 do=plan": "parallel.sequence_parallel=true cannot "
    "cut data.seq_len=255 into parallel.tp=2 equal parts. "
    "Fix: use data.seq_len=256, or parallel.sequence_parallel=false.",
    "model=v3_moe size=tiny parallel=3d parallel.sequence_parallel=true do=plan": "parallel.sequence_parallel=true "
    "cannot be used with model.n_mtp_layers=1, whose inputs are shorter sequences. "
    "Fix: set parallel.sequence_parallel=false, or model.n_mtp_layers=0.",
    "cluster.overlap=2": "cluster.overlap=2.0 must be at most 1. Fix: use 1 or less.",
    "do=verify verify.steps=501": "verify.steps=501 is more than trainer.max_steps=500. Fix: use 500 or less.",
    "do=verify verify.steps=0": "verify.steps=0 must be at least 1. Fix: use 1 or more.",
    "do=verify verify.loss_tolerance=-1": "verify.loss_tolerance=-1.0 must be at least 0. Fix: use 0 or more.",
    "do=verify resume=last": "resume='last' is not read by do=verify, whose two runs start anew. "
    "Fix: leave resume out.",
    "do=verify launch=slurm": "launch.launcher='slurm' cannot be used with do=verify, whose two runs follow each other "
    "on this machine. Fix: use launch=local.",
    "do=verify parallel=3d parallel.tp=4 device=cpu": "parallel.tp=4 does not divide model.n_heads=6. "
    "Fix: use parallel.tp of 1, 2.",
    "-m resume=last": "resume='a sweep' cannot be combined with -m. Fix: resume one run at a time, without -m.",
}


@pytest.fixture(autouse=True, scope="module")
def _schema():
    config.register()


def problems_of(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        command_line.check_command_line(argv)
    return str(caught.value)


@pytest.mark.parametrize("command_line", MESSAGES)
def test_message(command_line):
    assert problems_of(*command_line.split(" ")) == MESSAGES[command_line]


@pytest.mark.parametrize(
    ("bound", "inside", "outside"),
    [({"ge": 1}, (1, 2), 0), ({"gt": 1}, (2,), 1), ({"le": 1}, (1, 0), 2), ({"lt": 1}, (0,), 1)],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_a_bound_is_inclusive_or_exclusive(bound, inside, outside):
    section = dataclasses.make_dataclass("Section", [("n", int, dataclasses.field(metadata={"bounds": bound}))])
    assert [p for n in inside for p in bounds.range_problems(section(n), "")] == []
    (problem,) = bounds.range_problems(section(outside), "a.")
    assert (problem.key, problem.value) == ("a.n", outside)


def test_no_rule_counts_up_to_a_huge_number(monkeypatch):
    exp = composed("do=plan")
    exp.model.n_heads = 10**9 + 1
    monkeypatch.setattr(validate, "RULES", [lambda _: pytest.fail("a rule is asked")])
    assert [p.key for p in validate.problems(exp)] == ["model.n_heads"]


def test_a_null_character_is_no_part_of_a_path():
    (problem,) = values.path_problems("data.mixture.a.path", "a\0b")
    assert problem.rule == "holds a null character, which ends a text"


def test_a_tilde_is_taken_where_it_is_expanded():
    assert [*values.path_problems("data.path", "~/x")] == []


def test_missing_path_names_the_folder_it_looked_in(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert problems_of("data=text", "data.path=nowhere") == (
        f"data.path='nowhere' does not exist (looked in {tmp_path}). Fix: name a file, folder or glob that does."
    )


def test_missing_parts_and_tokenizers_are_told(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    fix = "Fix: name a file, folder or glob that does."
    parts = ("+data.mixture.a.path=nowhere", "+data.mixture.b.path=.", "+data.mixture.b.valid_path=x/*")
    assert problems_of("data=mixture", *parts, "data.tokenizer=gone.json").splitlines() == [
        f"data.tokenizer='gone.json' is no file (looked in {tmp_path}). "
        "Fix: name a tokenizer.json, or set data.tokenizer=null to train one.",
        f"data.mixture.a.path='nowhere' does not exist (looked in {tmp_path}). {fix}",
        f"data.mixture.b.valid_path='x/*' does not exist (looked in {tmp_path}). {fix}",
    ]


class TestInitFrom:
    LLAMA: ClassVar = {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    }  # fmt: skip

    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps(self.LLAMA))
        (tmp_path / "tokenizer.json").write_text("{}")
        return tmp_path

    def test_it_decides_the_model_and_the_tokenizer(self, folder):
        config.register()
        overrides = [f"init_from={folder}", "model.max_seq_len=32", "model.init_std=0.5"]
        with initialize_config_dir(compose.CONF, version_base="1.3"):
            cfg, problems = init_from.start_from(hydra_compose("config", overrides), overrides)
        assert problems == []
        cfg = compose.to_experiment(cfg)
        assert (cfg.model.version, cfg.model.d_model, cfg.model.n_kv_heads, cfg.model.window) == ("llama", 64, 4, 0)
        assert (cfg.model.max_seq_len, cfg.data.seq_len, cfg.model.init_std) == (32, 32, 0.5)
        assert cfg.model.rope_scaling.original_max_seq_len == 64
        assert cfg.data.tokenizer == str(folder / "tokenizer.json")

    @pytest.mark.parametrize(
        ("override", "value"),
        [("model=v3_moe", "'v3_moe'"), ("size=tiny", "'tiny'"), ("model.n_layers=4", "4"), ("model.moe.top_k=0", "0")],
    )
    def test_nothing_else_does(self, folder, override, value):
        key = override.split("=")[0]
        assert problems_of(f"init_from={folder}", override) == (
            f"{key}={value} cannot be used with init_from={folder}, whose config.json defines the model. "
            f"Fix: leave {key} out."
        )

    def test_what_it_cannot_be_combined_with(self, folder):
        assert problems_of(f"init_from={folder}", "resume=last") == (
            f"init_from='{folder}' cannot be combined with resume=last, whose checkpoint has weights and a model of "
            "its own. Fix: leave one of the two out."
        )
        assert problems_of(f"init_from={folder}", "do=export") == (
            f"init_from='{folder}' is not written by do=export, which takes a checkpoint of a run. "
            "Fix: set resume=<checkpoint> instead."
        )

    def test_what_is_missing(self, folder):
        (folder / "tokenizer.json").unlink()
        assert problems_of(f"init_from={folder}") == (
            f"init_from='{folder}' has no tokenizer.json. Fix: put the model's own there (AutoTokenizer's "
            "save_pretrained writes one), or name one by data.tokenizer."
        )
        assert problems_of(f"init_from={folder}/gone") == (
            f"init_from='{folder}/gone' is a folder that does not exist. "
            "Fix: init_from takes a folder of this machine, not a name on the hub: download one first, for example "
            "with hf download Qwen/Qwen3-0.6B --local-dir qwen3-0.6b."
        )

    def test_a_field_that_is_not_built_and_a_broken_rule_are_told(self, folder):
        (folder / "config.json").write_text(json.dumps({**self.LLAMA, "hidden_act": "gelu"}))
        assert problems_of(f"init_from={folder}", "optim.lr=-1") == (
            f"hidden_act='gelu' in {folder}/config.json is not silu, the only gate of our feed-forward network. "
            "Fix: use another checkpoint: this part is not built.\n"
            "optim.lr=-1.0 must be greater than 0. Fix: use more than 0."
        )
        (folder / "config.json").write_text(json.dumps({**self.LLAMA, "num_key_value_heads": 3}))
        assert problems_of(f"init_from={folder}", "do=eval") == (
            "model.n_kv_heads=3 does not divide model.n_heads=4. Fix: use model.n_kv_heads of 1, 2, 4."
        )


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(machine, "visible_gpus", lambda: 0)
    assert problems_of("device=cuda") == (
        "device='cuda' needs a CUDA device and none is visible. Fix: use device=cpu or device=auto."
    )
    command_line.check_command_line(["device=cuda", "do=plan"])  # a plan needs none


@pytest.mark.parametrize(
    ("device", "rule"),
    [("auto", "none is visible"), ("cpu", "device=cpu is asked for")],
)
def test_kernels_for_a_gpu_that_is_not_there(monkeypatch, device, rule):
    monkeypatch.setattr(machine, "visible_gpus", lambda: int(device == "cpu"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    argv = ["kernels.rms_norm=triton", f"device={device}"]
    assert problems_of(*argv) == (f"kernels.rms_norm='triton' needs a CUDA device and {rule}. Fix: use kernels=torch.")
    assert problems_of(*argv, "kernels.rope=triton").startswith("kernels.{rms_norm,rope}='triton' needs a CUDA device")
    command_line.check_command_line([*argv, "do=plan"])
    export = composed(*argv[:1], "do=plan")
    export.do, export.device = Do.export, Device(device)
    assert not any(p.key.startswith("kernels") for p in validate.problems(export))  # it reads files alone
    command_line.check_command_line([*argv, "launch=torchrun"])  # the machines with the ranks may have one
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    command_line.check_command_line(argv)


def refused(*argv: str) -> str:
    with initialize_config_dir(compose.CONF, version_base="1.3"):
        composed = hydra_compose("config", list(argv))
    with pytest.raises(ConfigError) as caught:
        make_job(composed, argv, "small", None)
    return str(caught.value)


BIG = ("model=v4_distill", "size=7b", "cluster=h100_8", "trainer.micro_batch_seqs=1")


class TestMemory:
    """What does not fit the cluster is told when the job is made."""

    def test_a_layout_is_told_with_one_that_fits(self):
        assert refused(*BIG, "parallel=ddp", "trainer.precision=bf16") == (
            "parallel.dp=8 does not fit: a rank of stage 0 needs 163.40 GB of 73.60 GB usable "
            "(cluster.memory_bytes=8e+10, H100 SXM 80GB). Fix: use parallel.dp=8 parallel.tp=1 parallel.pp=1 "
            "parallel.ep=1 parallel.zero_stage=2 parallel.sequence_parallel=false trainer.micro_batch_seqs=1 "
            "trainer.activation_checkpointing=none."
        )

    def test_where_nothing_fits_the_remedies_are_told(self):
        usable = "25.76 GB usable (cluster.memory_bytes=2.8e+10, H100 SXM 80GB)"
        fix = "Fix: set data.seq_len=2048, or cluster.n_nodes=2."
        small = (*BIG, "size=3b", "cluster.gpus_per_node=2", "cluster.memory_bytes=2.8e10")
        assert refused(*small, "parallel=ddp") == (
            f"parallel.dp=2 does not fit: a rank of stage 0 needs 80.63 GB of {usable}. {fix}"
        )
        assert refused(*small, "parallel=auto") == (
            f"parallel.auto=true finds no layout that fits 2 ranks of {usable}. {fix}"
        )

    @pytest.mark.parametrize(
        ("device", "gpus"), [("cpu", ""), ("auto", "name your GPUs, if the ranks are GPUs, as in cluster=h100_8, or ")]
    )
    def test_where_nothing_helps(self, device, gpus):
        assert refused("parallel=auto", "cluster.memory_bytes=1", f"device={device}") == (
            "parallel.auto=true finds no layout that fits 8 ranks of 0.00 GB usable "
            f"(cluster.memory_bytes=1, CPU process). Fix: {gpus}take a smaller model, or GPUs with more memory."
        )

    def test_gpus_planned_as_processes_of_a_cpu(self):
        layout = ("parallel=ddp", "parallel.dp=2", "trainer.micro_batch_seqs=4")
        _, fix = refused("model=v1_dense", "size=1b", *layout).split("Fix: ")
        assert fix.startswith("name your GPUs, if the ranks are GPUs, as in cluster=h100_8, or ")


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(machine, "visible_gpus", lambda: 2)
    assert problems_of("parallel=3d") == (
        "parallel.dp=2 makes 8 ranks (dp=2 x tp=2 x pp=2) and this machine has 2 GPUs. Fix: lower parallel.dp, "
        "parallel.tp or parallel.pp to 2 ranks or less, or set device=cpu."
    )
    # on a CPU there may be any number; other machines are not this one; one process needs one GPU
    for more in (["device=cpu"], ["launch=torchrun"], ["launch=slurm", "launch.n_nodes=4"], ["do=plan"]):
        command_line.check_command_line(["parallel=3d", *more])
    command_line.check_command_line(["parallel=3d", "parallel.dp=1", "parallel.tp=1", "parallel.ep=1"])


def test_slurm_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert problems_of("launch=slurm", "launch.submit=true") == (
        "launch.submit=true needs sbatch, which is not in PATH. "
        "Fix: set launch.submit=false and submit the script where Slurm is, or put sbatch into PATH."
    )


def test_all_problems_are_told_together():
    told = problems_of("optim.lr=x", "size=hugee", "seed=a", "model.n_heads=0", "data.seq_len=4096").splitlines()
    assert [line.split("=")[0] for line in told] == ["size", "optim.lr", "seed", "model.n_heads", "data.seq_len"]


def test_a_sweep_is_checked_whole_before_its_first_job():
    told = problems_of("-m", "model.n_heads=4,3,5", "optim.lr=-1,1e-3").splitlines()
    assert told == [
        "optim.lr=-1.0 must be greater than 0. Fix: use more than 0.",
        "model.n_kv_heads=2 does not divide model.n_heads=3. Fix: use model.n_kv_heads of 1, 3.",
        "model.n_kv_heads=2 does not divide model.n_heads=5. Fix: use model.n_kv_heads of 1, 5.",
    ]


def test_an_error_answers_within_two_seconds_without_heavy_imports():
    code = (
        "import sys, runpy\n"
        "sys.argv = ['run.py', 'optim.lrr=1']\n"
        "try:\n    runpy.run_path('run.py', run_name='__main__')\n"
        "except SystemExit as e:\n"
        "    heavy = {'torch', 'pytorch_lightning', 'mlflow', 'transformers', 'deepspeed'} & set(sys.modules)\n"
        "    print(e.code, sorted(heavy))\n"
    )
    for _ in range(10):  # the first that is fast enough: what else the machine does is not the question
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
        seconds = time.monotonic() - started
        assert done.stdout.strip() == "2 []", done.stderr
        assert done.stderr.strip() == MESSAGES["optim.lrr=1"]
        if seconds < 2:
            return
    pytest.fail(f"took {seconds:.1f} s")


def test_help_lists_every_key_and_group():
    done = subprocess.run([sys.executable, "run.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(f"  {key} " in done.stdout for key in compose.schema_keys())
    assert "  size        175b, 1b, 3b, 70b, 7b, base, published, small, tiny" in done.stdout
