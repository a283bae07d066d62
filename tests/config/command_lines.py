"""Command lines that are refused, each with what is wrong with it: the key and the id of each problem.

What is said about them stands in tests/golden/messages.txt, which `make golden` writes.
"""

from __future__ import annotations

from collections.abc import Sequence

from deepseek_exp.config.machine import Machine
from deepseek_exp.errors import ConfigError
from deepseek_exp.experiment import command_line

PAIRS = "{data:preference,data.path:README.md}"

REFUSED = {
    "optim.lrr=1": "optim.lrr override_words",
    "lr=1": "lr override_words",
    "trainer.eval_batches=4": "trainer.eval_batches override_words",
    "xyzzy=1": "xyzzy override_words",
    "+optim.momentum=1": "optim.momentum structured",
    "++foo=1": "foo structured",
    "model=v1_dens": "model _option_words",
    "size=enormous": "size _option_words",
    "recipes=nothing_like_it": "recipes _option_words",
    "hydra/launcher=basicc": "hydra/launcher _option_words",
    "do=trian": "do value_words",
    "device=tpu": "device value_words",
    "optim.lr=abc": "optim.lr value_words",
    "seed=x": "seed value_words",
    "trainer.compile=maybe": "trainer.compile value_words",
    "tracking.tags=x": "tracking.tags value_words",
    "model.rope_theta=null": "model.rope_theta value_words",
    "~optim": "optim _option_problem",
    "output_dir=${nope}": "output_dir structured",
    "optim.lr=[1": "command line unparsed",
    "model.n_heads=2,4": "model.n_heads override_words",
    "trainer.callbacks.stop={a:1}": "trainer.callbacks.stop _entry_words",
    "+trainer.callbacks.stop={_target_:os.system}": "trainer.callbacks.stop._target_ _node_problems",
    "+trainer.callbacks.stop={a:1}": "trainer.callbacks.stop _node_problems",
    "model.n_heads=0": "model.n_heads range_problems",
    "optim.lr=-1": "optim.lr range_problems",
    "sample.top_p=1.5": "sample.top_p range_problems",
    "data.valid_fraction=1.0": "data.valid_fraction range_problems",
    "model=v3_moe size=tiny model.kv_lora_rank=0": "model.kv_lora_rank _latent_attention",
    "model=v3_moe size=tiny model.qk_rope_head_dim=7": "model.qk_rope_head_dim _latent_attention",
    "model=v3_moe size=tiny model.qkv_bias=true": "model.qkv_bias _latent_attention",
    "model.rope_scaling.factor=2": "model.rope_scaling.factor _latent_attention",
    "model.rope_scaling.low_freq_factor=9": "model.rope_scaling.low_freq_factor _latent_attention",
    "model.d_ff_active=9999": "model.d_ff_active _feed_forward",
    "model=v3_moe size=tiny model.n_mtp_layers=64": "model.n_mtp_layers _feed_forward",
    "model.moe.n_shared_experts=1": "model.moe.n_shared_experts _feed_forward",
    "model.moe.domains=[a,b]": "model.moe.domains _feed_forward",
    "model.moe.capacity_factor=1.5": "model.moe.capacity_factor _feed_forward",
    "model.moe.balance=bias model.moe.sequence_loss_weight=0.1": (
        "model.moe.balance _feed_forward, model.moe.sequence_loss_weight _feed_forward"
    ),
    "model=v2_moe size=tiny model.d_ff_active=64": "model.d_ff_active _experts",
    "model=v2_moe size=tiny model.moe.top_k=17": "model.moe.top_k _experts, model.moe.top_k _groups",
    "model=v2_moe size=tiny model.moe.top_k=1": "model.moe.norm_top_k _experts",
    "model=v2_moe size=tiny model.moe.d_expert=20": "model.moe.d_expert _experts",
    "model=v2_moe size=tiny model.moe.n_dense_layers=2": "model.moe.n_dense_layers _experts",
    "model=v2_moe size=tiny model.moe.n_groups=0": "model.moe.n_groups range_problems",
    "hydra/sweeper=[]": "hydra/sweeper _sweep_problems",
    "model=v2_moe size=tiny model.moe.n_groups=3": "model.moe.n_groups _groups",
    "model=v2_moe size=tiny model.moe.top_k_groups=5": "model.moe.top_k_groups _groups",
    "model=v2_moe size=tiny model.moe.top_k=9": "model.moe.top_k _groups",
    "model=v2_moe size=tiny model.moe.n_groups=16 model.moe.group_score=top2_sum": "model.moe.group_score _groups",
    "model=v5_domain_moe size=tiny model.moe.domains=[a]": "model.moe.domains _domains",
    "model=v5_domain_moe size=tiny model.moe.domains=[a,b,c]": "model.moe.domains _domains",
    "model=v5_domain_moe size=tiny model.moe.top_k=3": "model.moe.top_k _domains",
    "model=v5_domain_moe size=tiny model.moe.n_groups=2": "model.moe.n_groups _domains",
    "model=v5_domain_moe size=tiny model.moe.capacity_factor=1.25": "model.moe.capacity_factor _domains",
    "model=v5_domain_moe size=tiny model.moe.balance=aux_loss": "model.moe.balance _domains",
    "model=v5_domain_moe size=tiny model.moe.sequence_loss_weight=0.1": "model.moe.sequence_loss_weight _domains",
    "model=v5_domain_moe size=tiny data=mixture +data.mixture.sports.path=README.md": "data.mixture _domains",
    "model=v5_domain_moe size=tiny sample.domain=sports": "sample.domain sample_problems",
    "sample.domain=law": "sample.domain sample_problems",
    "sample.as_message=true": "sample.as_message sample_problems",
    "model.n_kv_heads=4": "model.n_kv_heads _heads",
    "model.head_dim=31": "model.head_dim _heads",
    "model.rotary_dim=7": "model.rotary_dim _heads",
    "model=v4_distill size=tiny model.rotary_dim=18": "model.rotary_dim _heads",
    "model=v3_moe size=tiny model.rotary_dim=8": "model.rotary_dim _latent_attention",
    "data.seq_len=4096": "data.seq_len length_problems",
    "model.memory_len=63": "model.memory_len length_problems",
    "model.memory_len=64 model.window=0 data.order=contiguous": "model.memory_len length_problems",
    "data.vocab_size=9999": "data.vocab_size vocabulary_problems",
    "trainer.global_batch_seqs=-1": "trainer.global_batch_seqs range_problems",
    "trainer.micro_batch_seqs=5": "trainer.micro_batch_seqs batch_problems",
    "optim.warmup_steps=100 trainer.max_steps=100": "optim.warmup_steps batch_problems",
    "data=text": "data.path data_problems",
    "data.path=/nowhere": "data.path data_problems",
    "data=synthetic data.max_bytes=null": "data.max_bytes data_problems",
    "data=mixture": "data.mixture mixture_problems",
    "+data.mixture.a.path=/": "data.mixture mixture_problems",
    "data=mixture data.mixture.a.path=/": "data.mixture.a.path _entry_words, data.mixture mixture_problems",
    "data=mixture +data.mixture.a.path=/ data.path=/": "data.path data_problems",
    "data=mixture +data.mixture.a.path=/ data.valid_path=/": "data.valid_path data_problems",
    "data=mixture +data.mixture.a.path=/ data.order=contiguous": "data.order mixture_problems",
    "data=mixture +data.mixture={a/b:{path:/}}": "data.mixture mixture_problems",
    "data=mixture +data.mixture.a.path=/ +data.mixture.a.wight=1": "data.mixture.a.wight _part",
    "data=mixture +data.mixture.a=/": "data.mixture.a _part",
    "data=mixture +data.mixture.a.weight=1": "data.mixture.a.path _part",
    "data=mixture +data.mixture.a.path=null": "data.mixture.a.path _part",
    "data=mixture +data.mixture.a.path=7": "data.mixture.a.path _part",
    "data=mixture +data.mixture.a.path=/ +data.mixture.a.weight=x": "data.mixture.a.weight _part",
    "data=mixture +data.mixture.a.path=/ +data.mixture.a.weight=true": "data.mixture.a.weight _part",
    "data=mixture +data.mixture.a.path=/ +data.mixture.a.weight=0": "data.mixture.a.weight range_problems",
    "data=mixture +data.mixture.a.path=/ +data.mixture.a.weight=inf": "data.mixture.a.weight range_problems",
    "optim.optimizer._target_=torch.optim.adam.torch.hub.load": "optim.optimizer._target_ _node_problems",
    "resume=": "resume text_problems",
    "output_dir=": "output_dir text_problems",
    "data=text data.path=": "data.path text_problems",
    "model.version=": "model.version text_problems",
    "do=": "do value_words",
    "device=gpu": "device value_words",
    "model=v3": "model _option_words",
    "steps=5": "steps override_words",
    "data.path=[a,b]": "data.path value_words",
    "data.path=~/x": "command line unparsed",
    "trainer.callbacks={a:{_target_:x}}": "trainer.callbacks value_words",
    "+tracking.tags.x=null": "tracking.tags.x _entry_words",
    "+tracking.tags={../x:1}": "tracking.tags _tags",
    "optim.optimizer=${seed}": "optim.optimizer structured",
    "trainer.compile=1000": "trainer.compile _value_problem",
    "optim=5": "optim _option_problem",
    "tracking.run_name=" + "x" * 300: "tracking.run_name _name",
    "export.path=" + "x" * 256: "export.path path_problems",
    "optim.lr=1" + "0" * 400: "optim.lr value_words",
    "tracking.uri='http://['": "tracking.uri tracking_problems",
    "tracking.uri='http://a:p[w]@h'": "tracking.uri tracking_problems",
    "tracking.uri='http:/a:pw@h'": "tracking.uri tracking_problems",
    "tracking.uri=sqlite:///": "tracking.uri _sqlite",
    "tracking.uri=sqlite:////tmp": "tracking.uri _sqlite",
    "output_dir='a?b'": "tracking.uri _sqlite",
    "trainer.global_batch_seqs=1000000000000": "trainer.global_batch_seqs range_problems",
    "model.n_heads=9223372036854775807": "model.n_heads range_problems",
    "data.n_workers=9223372036854775808": "data.n_workers range_problems",
    "trainer.n_threads=100000": "trainer.n_threads range_problems",
    "cluster.memory_bandwidth=1e-320": "cluster.memory_bandwidth range_problems",
    "optim.weight_decay=1e308": "optim.weight_decay range_problems",
    "sample.temperature=1e-320": "sample.temperature temperature_problems",
    "model.moe.top_k=2": "model.moe.top_k unread_problems",
    "model.qk_rope_head_dim=8": "model.qk_rope_head_dim unread_problems",
    "optim.lr=inf": "optim.lr range_problems",
    "model.norm_eps=1": "model.norm_eps range_problems",
    "resume='~nobody-of-this-name/x'": "resume path_problems",
    "data=mixture +data.mixture.a.path=" + "x" * 256: "data.mixture.a.path path_problems",
    "tracking.uri=sqlite:///" + "x" * 256: "tracking.uri path_problems",
    "resume=" + "a/" * 2001: "resume path_problems",
    "model.memory_len=64 data.order=contiguous": "model.memory_len length_problems",
    "model.memory_len=9 data.order=contiguous trainer.compile=true": "trainer.compile length_problems",
    "-m ++resume=last": "resume check_command_line",
    "optim.optimizer.betas=[${nope},1]": "optim.optimizer.betas[0] structured",
    "tracking.uri='sqlite:///a?b/m.db'": "tracking.uri _sqlite",
    "tracking.uri='ftp://alice:pw@h'": "tracking.uri tracking_problems",
    "tracking=none tracking.uri=sqlite:///x.db": "tracking.uri untracked_problems",
    "-m tracking=none,mlflow": "tracking sweep_problems",
    "tracking.uri=outputs": "tracking.uri tracking_problems",
    "cluster=h100_2": "cluster _option_words",
    "parallel=3d cluster=h100_1 device=cpu trainer.global_batch_seqs=9": "trainer.global_batch_seqs _batch",
    "launch=torchrun launch.n_nodes=3 parallel=3d": "launch.n_nodes _nodes",
    "launch=slurm launch.n_nodes=2 launch.ranks_per_node=8 parallel=3d": "launch.ranks_per_node _nodes",
    "launch.n_nodes=2 parallel=3d device=cpu": "launch.n_nodes _unread_launch_keys",
    "launch=torchrun launch.account=me": "launch.account _unread_launch_keys",
    "parallel.tp=-1 do=plan": "parallel.tp range_problems",
    "parallel.tp=4 do=plan": "parallel.tp illegal",
    "size=base model.n_kv_heads=2 model.n_heads=12 parallel.tp=3 do=plan": "parallel.tp illegal",
    "model.d_ff=513 parallel.tp=2 do=plan": "parallel.tp illegal",
    "model=v2_moe size=tiny model.moe.d_expert=8 model.n_heads=16 parallel.tp=16 cluster=h100_1024 do=plan": (
        "parallel.tp illegal"
    ),
    "model.vocab_size=4095 parallel.tp=2 do=plan": "parallel.tp illegal",
    "parallel.pp=5 parallel.zero_stage=1 do=plan": "parallel.pp illegal",
    "parallel.dp=2 parallel.ep=2 trainer.micro_batch_seqs=1 do=plan": "parallel.ep illegal",
    "model=v2_moe size=tiny parallel=3d parallel.dp=6 parallel.tp=1 parallel.pp=1 parallel.ep=6 "
    "trainer.global_batch_seqs=6 do=plan": ("parallel.ep illegal"),
    "model=v2_moe size=tiny parallel=3d parallel.ep=4 do=plan": "parallel.ep illegal",
    "parallel=3d parallel.zero_stage=3 do=plan": "parallel.zero_stage _zero",
    "parallel=3d parallel.zero_stage=0 do=plan": "parallel.zero_stage _zero",
    "parallel.dp=2 do=plan": "trainer.global_batch_seqs _batch",
    "parallel=3d trainer.global_batch_seqs=9 do=plan": "trainer.global_batch_seqs _batch",
    "parallel=3d cluster=h100_1 do=plan": "parallel.dp too_many",
    "parallel.dp=0 parallel.pp=0 do=plan": "parallel.pp layout_problems",
    "parallel.dp=0 parallel.tp=3 do=plan": "parallel.dp layout_problems",
    "parallel=auto parallel.tp=2": "parallel.tp _chosen",
    "model=v3_moe parallel=3d trainer.compile=true trainer.activation_checkpointing=full do=plan": (
        "trainer.compile illegal"
    ),
    "parallel=zero3 parallel.dp=2 trainer.micro_batch_seqs=4 trainer.compile=true do=plan": "trainer.compile illegal",
    "parallel=3d model.memory_len=63 data.order=contiguous do=plan": "model.memory_len _several",
    "parallel=3d parallel.pp=1 parallel.zero_stage=2 do=plan": "parallel.zero_stage _zero",
    "model=v2_moe size=tiny parallel=zero3 parallel.ep=2 trainer.micro_batch_seqs=1 do=plan": (
        "parallel.zero_stage _zero"
    ),
    "parallel=zero2 optim=adafactor trainer.micro_batch_seqs=1 do=plan": "optim.optimizer._target_ _zero",
    "parallel=3d optim=adafactor do=plan": "optim.optimizer._target_ _zero",
    "kernels=fused optim=adafactor do=plan": "kernels.adamw adamw_problems",
    "kernels=fused +optim.optimizer.amsgrad=true do=plan": "kernels.adamw adamw_problems",
    "trainer.cuda_graphs=true": "trainer.cuda_graphs cuda_graph_problems",
    "trainer.cuda_graphs=true parallel.tp=2 do=plan": "trainer.cuda_graphs cuda_graph_problems",
    "model=v2_5_sparse model.memory_len=9 data.order=contiguous trainer.cuda_graphs=true do=plan": (
        "trainer.cuda_graphs cuda_graph_problems"
    ),
    "optim.state_bits=8 do=plan": "optim.state_bits adamw_problems",
    "optim.state_bits=16 do=plan": "optim.state_bits adamw_problems",
    "kernels=fused optim.state_bits=8 parallel.tp=2 do=plan": "optim.state_bits adamw_problems",
    "do=plan sample.weight_bits=8": "sample.weight_bits weight_bits_problems",
    "do=plan sample.weight_bits=3": "sample.weight_bits weight_bits_problems",
    "parallel.tp=2 optim=adafactor do=plan": "optim.optimizer._target_ _zero",
    "parallel.sequence_parallel=true do=plan": "parallel.sequence_parallel _sequence",
    "parallel=3d parallel.sequence_parallel=true data.seq_len=255 do=plan": "parallel.sequence_parallel _sequence",
    "model=v3_moe size=tiny parallel=3d parallel.sequence_parallel=true do=plan": (
        "parallel.sequence_parallel _sequence"
    ),
    "cluster.overlap=2": "cluster.overlap range_problems",
    "do=verify verify.steps=501": "verify.steps verify_problems",
    "do=verify verify.steps=0": "verify.steps range_problems",
    "do=verify verify.loss_tolerance=-1": "verify.loss_tolerance range_problems",
    "do=verify resume=last": "resume verify_problems",
    "do=verify launch=slurm": "launch.launcher verify_problems",
    "do=verify parallel=3d parallel.tp=4 device=cpu": "parallel.tp illegal",
    "-m resume=last": "resume check_command_line",
    "optim=muon parallel.tp=2 do=plan": "optim.optimizer._target_ _zero",
    "optim=muon parallel=zero2 trainer.micro_batch_seqs=1 do=plan": "optim.optimizer._target_ _zero",
    "optim=muon optim.optimizer.momentum=1": "optim.optimizer.momentum _argument_problems",
    "optim=muon kernels=fused do=plan": "kernels.adamw adamw_problems",
    "+optim.lr_multipliers={blocks.0.wo:0.1}": "optim.lr_multipliers lr_multiplier_problems",
    "lora=default +optim.lr_multipliers={blocks.0.*.weight:0.1}": "optim.lr_multipliers lr_multiplier_problems",
    "+optim.lr_multipliers={embedding.*:fast}": "optim.lr_multipliers lr_multiplier_problems",
    "+optim.lr_multipliers={embedding.*:-1}": "optim.lr_multipliers lr_multiplier_problems",
    "+evaluate.tasks.x.kind=quiz": "evaluate.tasks.x.kind _task",
    "+evaluate.tasks.x.path=a": "evaluate.tasks.x.kind _task",
    "+evaluate.tasks.x=7": "evaluate.tasks.x _task",
    "+evaluate.tasks.x.kid=text": "evaluate.tasks.x.kid _task",
    "+evaluate.tasks={a/b:{kind:text,path:a}}": "evaluate.tasks _task_name",
    "+evaluate.tasks.x.kind=text": "evaluate.tasks.x.path _task",
    "+evaluate.tasks.x={kind:gsm8k,path:a,prompt:b}": "evaluate.tasks.x.answer _read_keys",
    "+evaluate.tasks.x={kind:text,path:a,prompt:b}": "evaluate.tasks.x.prompt _read_keys",
    "+evaluate.tasks.x={kind:text,path:a,limit:b}": "evaluate.tasks.x.limit _task",
    "+evaluate.tasks.x={kind:text,path:a,limit:-1}": "evaluate.tasks.x.limit range_problems",
    "+evaluate.tasks.x={kind:lm_eval}": "evaluate.tasks.x.tasks _read_keys",
    "evaluate=code": "evaluate.tasks.humaneval.kind _task",
    "evaluate.agree_with=last": "evaluate.agree_with evaluate_problems",
    "evaluate=quiz": "evaluate _option_words",
    "optim.ema_decay=1": "optim.ema_decay range_problems",
    "use_ema=true": "use_ema average_problems",
    "trainer.patience=-1": "trainer.patience range_problems",
    "trainer.batch_ramp_seqs=4": "trainer.batch_ramp_steps ramp_problems",
    "trainer.batch_ramp_steps=4": "trainer.batch_ramp_seqs ramp_problems",
    "trainer.batch_ramp_seqs=3 trainer.batch_ramp_steps=9 trainer.micro_batch_seqs=1": (
        "trainer.batch_ramp_seqs ramp_problems"
    ),
    "trainer.batch_ramp_seqs=4 trainer.batch_ramp_steps=9": "trainer.batch_ramp_seqs ramp_problems",
    "trainer.batch_ramp_seqs=8 trainer.batch_ramp_steps=500": "trainer.batch_ramp_steps ramp_problems",
    "trainer.batch_ramp_seqs=4 trainer.batch_ramp_steps=9 trainer.micro_batch_seqs=2 do=verify": (
        "trainer.batch_ramp_seqs ramp_problems"
    ),
    "trainer.batch_ramp_seqs=4 trainer.batch_ramp_steps=9 trainer.micro_batch_seqs=2 data.order=contiguous": (
        "trainer.batch_ramp_seqs ramp_problems"
    ),
    "trainer.batch_ramp_seqs=4 trainer.batch_ramp_steps=9 trainer.micro_batch_seqs=2 parallel.dp=2 "
    "parallel.zero_stage=1 do=plan": "trainer.batch_ramp_seqs ramp_problems",
    "optim.schedule=linear": "optim.schedule value_words",
    "optim.decay_fraction=0.5": "optim.decay_fraction unread_optim_problems",
    "optim=wsd optim.decay_fraction=0": "optim.decay_fraction range_problems",
    "optim.optimizer._target_=torch.optim.LBFGS": "optim.optimizer._target_ _node_problems",
    "optim.optimizer._target_=torch.optim.SGD": (
        "optim.optimizer.betas _argument_problems, optim.optimizer.eps _argument_problems"
    ),
    "+optim.optimizer.lr=1": "optim.optimizer.lr _argument_problems",
    "+optim.optimizer.weight_decay=5": "optim.optimizer.weight_decay _argument_problems",
    "+optim.optimizer._args_=[1]": "optim.optimizer._args_ _argument_problems",
    "optim.optimizer.betas=[2,3]": "optim.optimizer.betas _argument_problems",
    "optim.optimizer.betas=[0.9]": "optim.optimizer.betas _argument_problems",
    "optim.optimizer.eps=-1": "optim.optimizer.eps _argument_problems",
    "optim.optimizer.fused=maybe": "optim.optimizer.fused _argument_problems",
    "+optim.optimizer.foreach=true": "optim.optimizer.foreach _argument_problems",
    "+trainer.callbacks.a._target_=pytorch_lightning.callbacks.EarlyStopping": (
        "trainer.callbacks.a.monitor _argument_problems"
    ),
    "+trainer.callbacks.a={_target_:pytorch_lightning.callbacks.Timer,duration:abc}": (
        "trainer.callbacks.a.duration _argument_problems"
    ),
    "+trainer.callbacks.a._target_=deepseek_exp.train.callbacks.Path": "trainer.callbacks.a._target_ _node_problems",
    "+trainer.callbacks.a._target_=torch.optim.AdamW": "trainer.callbacks.a._target_ _node_problems",
    "+hydra.callbacks.x._target_=evil.Evil do=plan": "hydra.callbacks.x._target_ override_problem",
    "~hydra.callbacks.sweep": "hydra.callbacks.sweep override_problem",
    "hydra.sweep.subdir=../../x": "hydra.sweep.subdir override_problem",
    "hydra.job.env_copy=[NOPE]": "hydra.job.env_copy override_problem",
    "hydra.mode=MULTIRUN": "hydra.mode override_problem",
    "-m hydra.job.name=a,b": "hydra.job.name override_problem",
    "hydra.launcher._target_=os.system": "hydra.launcher._target_ section_problems",
    "+hydra.launcher.x=1": "hydra.launcher.x _sweep_problems",
    "hydra.searchpath=[pkg://evil]": "hydra.searchpath _searchpath_problem",
    "hydra.sweep.dir=/x": "hydra.sweep.dir _sweep_dir_problem",
    "hydra.sweeper.params=..": "hydra.sweeper.params override_problem",
    "hydra.verbose=7": "hydra.verbose override_problem",
    "recipes=../../elsewhere/x": "recipes _option_problem",
    "size=/etc/x": "size _option_problem",
    "--experimental-rerun x.pickle": "--experimental-rerun flag_problems",
    "--config-name x": "--config-name flag_problems",
    "--run -m": "command line flag_problems",
    "-p nope": "--package flag_problems",
    "-m seed=interval(0,1)": "seed sweep_problems",
    "-m model=glob(zz*)": "model sweep_problems",
    "-m seed=range(0,100000000)": "sweep sweep_problems",
    "size=7": "size _option_problem",
    "recipes=null": "recipes _option_problem",
    "kernels=[torch,1]": "kernels _option_problem",
    "+size@_global_=tiny": "size@_global_ _option_problem",
    "do=sft": "do chat_problems",
    "data=chat data.path=/": "data.source chat_problems",
    "do=sft data=chat": "data.path data_problems",
    "do=sft data=chat data.path=/ +data.mixture.a.path=/": "data.path data_problems",
    "do=sft data=chat data.path=/ data.order=contiguous": "data.order chat_problems",
    "do=sft data=chat data.path=/ data.train_on=[]": "data.train_on chat_problems",
    "do=sft data=chat data.path=/ data.train_on=[bot]": "data.train_on chat_problems",
    "do=sft data=chat data.path=/ data.template=no.jinja": "data.template template_problems",
    "data.train_on=[user]": "data.train_on unread_chat_problems",
    "do=plan data=chat data.path=/ kernels=fused": "data.isolate_documents isolation_problems",
    "do=plan data.isolate_documents=true model.memory_len=63 data.order=contiguous": (
        "data.isolate_documents isolation_problems"
    ),
    "do=plan trainer.max_epochs=2": "trainer.max_epochs batch_problems",
    "trainer.max_epochs=0": "trainer.max_epochs range_problems",
    "~seed": "seed _value_problem",
    "~size": "size _option_problem",
    "lora=default lora.targets=[*.wq_c,head.*]": "lora.targets _no_match, lora.targets _no_match",
    "lora=default lora.targets=[]": "lora.targets lora_problems",
    "lora=default lora.exclude=[router]": "lora.exclude _no_match",
    "lora=default lora.exclude=[blocks.*]": "lora.exclude lora_problems",
    "model.tie_embeddings=true lora=default lora.targets=[head]": "lora.targets _no_match",
    "model=v3_moe size=tiny lora=default lora.rank=17": "lora.rank _rank",
    "lora=default lora.path=nothing": "lora.path _file",
    "do=plan lora=default lora.path=nothing": "lora.path _file",
    "lora.rank=-1": "lora.rank range_problems",
    "do=dpo": "data.source finetune_problems",
    "data=preference data.path=README.md data.tokenizer=README.md": "data.source finetune_problems",
    "do=dpo data=preference data.path=README.md": "data.tokenizer _rows",
    "do=dpo data=preference data.tokenizer=README.md": "data.path data_problems",
    "do=dpo data=preference data.path=README.md data.tokenizer=README.md data.order=contiguous": "data.order _rows",
    "do=dpo data=preference data.path=README.md data.tokenizer=README.md data.max_bytes=9": "data.max_bytes _rows",
    "do=dpo data=preference data.path=README.md data.tokenizer=README.md trainer.micro_batch_seqs=1": (
        "trainer.micro_batch_seqs _preferences"
    ),
    "do=dpo data=preference data.path=README.md data.tokenizer=README.md trainer.eval_seqs=3": (
        "trainer.eval_seqs _preferences"
    ),
    "do=dpo data=preference data.path=README.md data.tokenizer=README.md dpo.loss=ipo dpo.label_smoothing=0.1": (
        "dpo.label_smoothing _preferences"
    ),
    "do=dpo data=preference data.path=README.md data.tokenizer=README.md dpo.loss=orpo dpo.reference=last": (
        "dpo.reference _preferences"
    ),
    "do=dpo data=preference data.path=README.md data.tokenizer=README.md model.memory_len=9 data.order=contiguous": (
        "data.order _rows, model.memory_len _training"
    ),
    "do=dpo data=preference data.path=README.md data.tokenizer=README.md model=v3_moe size=tiny parallel.dp=2 "
    "parallel.zero_stage=1 trainer.global_batch_seqs=8 trainer.micro_batch_seqs=2": "model.n_mtp_layers _training",
    **{
        f"do=grpo data=prompts data.path=README.md data.tokenizer=README.md {line}": problems
        for line, problems in {
            "grpo.max_new_tokens=1000": "grpo.max_new_tokens _reinforcement",
            "grpo.group_size=3": "trainer.global_batch_seqs _reinforcement",
            "parallel.tp=2 parallel.zero_stage=1": "parallel.tp _reinforcement",
            "parallel=zero3 parallel.dp=2 trainer.micro_batch_seqs=4 trainer.global_batch_seqs=16": (
                "parallel.zero_stage _reinforcement"
            ),
            "trainer.compile=true": "trainer.compile _reinforcement",
            "data.isolate_documents=true": "data.isolate_documents _rows",
            "trainer.max_epochs=2": "trainer.max_epochs _reinforcement",
            "trainer.precision=fp8": "trainer.precision _reinforcement",
            "model=v2_moe size=tiny grpo.max_new_tokens=8 model.moe.capacity_factor=1.25": (
                "model.moe.capacity_factor _reinforcement"
            ),
            "~grpo.rewards.answer": "grpo.rewards _rewards",
            "grpo.rewards.answer._target_=os.system": "grpo.rewards.answer._target_ _reward",
            "grpo.rewards.answer._target_=recipes.rewards.mine": "grpo.rewards.answer._target_ _reward",
            "grpo.rewards.answer._target_=deepseek_exp.finetune.rewards.exact": "grpo.rewards.answer._target_ _reward",
            "+grpo.rewards.answer.tolerance=1": "grpo.rewards.answer.tolerance _arguments",
            "+grpo.rewards.answer.weight=x": "grpo.rewards.answer.weight _arguments",
            "+grpo.rewards.x={weight:1}": "grpo.rewards.x _reward",
            "grpo.rewards.answer._target_=deepseek_exp.finetune.rewards.regex_match": (
                "grpo.rewards.answer.pattern _arguments"
            ),
            "grpo.rewards.answer._target_=deepseek_exp.finetune.rewards.regex_match "
            "+grpo.rewards.answer.pattern='(x'": "grpo.rewards.answer.pattern _arguments",
        }.items()
    },
    "chain.reuse=strict": "chain.reuse unchained_problems",
    "+chain.stages.a=7": "chain.stages.a _form_problems",
    "+chain.stages.a.doo=train": "chain.stages.a.doo _form_problems, chain.stages.a.do _form_problems",
    "+chain.stages.a={do:train,start:7}": "chain.stages.a.start _form_problems",
    "+chain.stages.a={do:train,set:7}": "chain.stages.a.set _form_problems",
    "+chain.stages.a={do:train,branches:[b]}": "chain.stages.a.branches _form_problems",
    "+chain.stages.last.do=train": "chain.stages _stage_problems",
    "+chain.stages.a.do=plan": "chain.stages.a.do _stage_problems",
    "+chain.stages.a.do=eval": "chain.stages.a.start _start_problems",
    "+chain.stages.a={do:train,set:{tracking:none}}": "chain.stages.a.set.tracking _stage_problems",
    "+chain.stages.a={do:train,set:{do:eval}}": "chain.stages.a.set.do _stage_problems",
    "+chain.stages.a.do=train do=sample": "do chain_problems",
    "+chain.stages.a.do=train resume=last": "resume chain_problems",
    "+chain.stages.a.do=train launch=torchrun": "launch.launcher chain_problems",
    "+chain.stages.a.do=train chain.only=[b]": "chain.only chain_problems",
    "+chain.stages.a.do=train chain.yardstick.tokens=-1": "chain.yardstick.tokens range_problems",
    "+chain.stages.a.do=train chain.yardstick.tokens=0 chain.stop_if.loss_rise_percent=5": (
        "chain.stop_if.loss_rise_percent chain_problems"
    ),
    "+chain.stages.a={do:train,start:b} +chain.stages.b={do:train,start:a}": (
        "chain.stages.a.start _start_problems, chain.stages.b.start _start_problems"
    ),
    "+chain.stages.a.do=train +chain.stages.b.do=eval +chain.stages.c={do:train,start:b}": (
        "chain.stages.c.start _start_problems"
    ),
    "+chain.stages.a={do:dpo,reference:7}": "chain.stages.a.reference _form_problems",
    "+chain.stages.a={do:train,reference:last}": "chain.stages.a.reference _stage_problems",
    "+chain.stages.a.do=train +chain.stages.b={do:dpo,start:a,reference:c} +chain.stages.c={do:train,start:b}": (
        "chain.stages.b.reference _start_problems, chain.stages.c.start _start_problems"
    ),
    "+chain.stages.a.do=train +chain.stages.b.do=eval +chain.stages.c={do:dpo,reference:b}": (
        "chain.stages.c.reference _start_problems"
    ),
    f"+chain.stages.a.do=train +chain.stages.c={{do:dpo,reference:last,set:{PAIRS}}}": "c: reference _with_reference",
    f"+chain.stages.a.do=train +chain.stages.c={{do:dpo,reference:nowhere,set:{PAIRS}}}": "c: dpo.reference _nothing",
    f"+chain.stages.a.do=train +chain.stages.c={{do:dpo,reference:a,set:{PAIRS}}} dpo.reference=x": (
        "c: reference _with_reference"
    ),
    f"+chain.stages.a.do=train +chain.stages.c={{do:dpo,reference:a,set:{PAIRS}}} dpo.loss=orpo": (
        "c: dpo.reference _preferences"
    ),
    "+chain.stages.o={do:train,start:scratch,set:{model.n_layers:3}} +chain.stages.a={do:train,start:scratch} "
    f"+chain.stages.c={{do:dpo,reference:o,set:{PAIRS}}}": "c: dpo.reference other_model",
    "+chain.stages.a={do:train,start:nothing_like_it}": "a: start _from_outside",
    "+chain.stages.a.do=train +chain.stages.b={do:train,set:{branches:{law:a}}}": (
        "chain.stages.b.set.branches _stage_problems"
    ),
    "+chain.stages.a.do=train +chain.stages.b={do:train,start:a,branches:{law:c}}": (
        "chain.stages.b.branches.law _branch_problems"
    ),
    "+chain.stages.a.do=train +chain.stages.b={do:eval} +chain.stages.c={do:train,start:a,branches:{law:b}}": (
        "chain.stages.c.branches.law _branch_problems"
    ),
    "+chain.stages.a.do=train +chain.stages.b={do:train,start:scratch,branches:{law:a}}": (
        "chain.stages.b.branches.law _branch_problems"
    ),
    "+chain.stages.a.do=train +chain.stages.b.do=train +chain.stages.c={do:train,start:b,branches:{law:a}}": (
        "chain.stages.c.branches.law _branch_problems"
    ),
    "+chain.stages.a.do=train +chain.stages.b={do:train,start:a,branches:{law:b}}": (
        "chain.stages.b.start _start_problems"
    ),
    "+chain.stages.a.do=train +chain.stages.b={do:dpo,start:a,branches:{law:a}}": (
        "chain.stages.b.branches _branch_problems"
    ),
    "+chain.stages.a.do=train +chain.stages.b={do:train,start:a,branches:{law:a}}": (
        "chain.stages.b.branches.law domain_problems"
    ),
    "model=v5_domain_moe size=tiny +chain.stages.a.do=train +chain.stages.b={do:train,start:a,branches:{lwa:a}}": (
        "chain.stages.b.branches.lwa domain_problems"
    ),
    "model=v5_domain_moe size=tiny +chain.stages.a.do=train "
    "+chain.stages.b={do:train,start:a,set:{model:{moe:{balance:none}}}} "
    "+chain.stages.c={do:train,start:a,branches:{law:b}}": "b: model.moe.balance _branch_problems",
    "model=v5_domain_moe size=tiny +branches.law=last": "branches branch_problems",
    "model=v5_domain_moe size=tiny +branches.law=last do=verify parallel=3d device=cpu": "branches branch_problems",
    "+chain.stages.a.do=train init_from=last": "a: start _from_outside",
    "+chain.stages.a.do=train trainer.keep_checkpoints=0": "a: trainer.keep_checkpoints _keeping_problems",
    "+chain.stages.a={do:train,set:{optim:{lrr:1}}} +chain.stages.b={do:train,set:{seed:x}} optim.lr=-1": (
        "a: optim.lrr override_words, a, b: optim.lr range_problems, b: seed value_words"
    ),
    "+chain.stages.a.do=train +chain.stages.b={do:train,set:{model:v3_moe}}": "b: model _with_model_of",
    "+chain.stages.a.do=train +chain.stages.b={do:train,set:{model:{n_layers:3}}}": "b: model.n_layers _with_model_of",
    "+chain.stages.a.do=train +chain.stages.b={do:train,set:{data:{tokenizer:README.md}}}": (
        "b: data.tokenizer _with_model_of"
    ),
    "+chain.stages.a.do=train +chain.stages.b={do:train,set:{data:{seq_len:999}}}": "b: data.seq_len length_problems",
    "+chain.stages.a.do=train +chain.stages.b={do:train,set:{lora:default,lora.targets:[wqq]}}": (
        "b: lora.targets _no_match"
    ),
    "+chain.stages.a.do=train +chain.stages.b={do:grpo,set:{data:prompts,data.path:README.md,"
    "grpo.rewards:{x:{_target_:recipes.rewards.mine}}}}": "b: grpo.rewards.x._target_ _reward",
    "-m +chain.stages.a.do=train seed=1,2": "chain.stages _composed",
}


def refusal(argv: Sequence[str], machine: Machine | None = None) -> ConfigError | None:
    """Return the error that answers a command line, None if it is accepted; machine None: this one."""
    try:
        command_line.check_command_line(argv, machine)
    except ConfigError as error:
        return error
    return None


def ids(error: ConfigError | None) -> list[str]:
    """Return `key id` for each problem of an error."""
    return [f"{p.key} {p.id}" for p in error.problems] if error is not None else []
