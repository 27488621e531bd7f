"""What TRL and verl call a setting, an argument or a class -> what it is called here: for whoever comes from there."""

ELSEWHERE = {
    name: f"That is a name of TRL or verl; here it is {ours}."
    for names, ours in {
        ("beta", "kl_loss_coef"): "algorithm.kl_coef",
        ("num_generations", "rollout_n", "n"): "rollout.group_size",
        ("max_completion_length", "max_response_length", "max_new_tokens"): "rollout.max_completion_tokens",
        ("max_prompt_length",): "data.max_prompt_tokens",
        ("epsilon", "epsilon_low", "clip_ratio", "clip_ratio_low"): "algorithm.clip_low",
        ("epsilon_high", "clip_ratio_high"): "algorithm.clip_high",
        ("loss_type", "loss_agg_mode"): "algorithm.aggregation (grpo: sequence, dapo: token, dr_grpo: constant)",
        ("scale_rewards", "norm_adv_by_std_in_grpo"): "algorithm.normalize_by_std (true: the group's, batch, or false)",
        ("num_iterations", "ppo_epochs"): "algorithm.num_epochs",
        ("importance_sampling_level",): "algorithm.ratio (token, or sequence as in GSPO)",
        ("mask_truncated_completions",): "algorithm.filter_truncated",
        ("top_entropy_quantile",): "algorithm.top_entropy (the share of tokens that count)",
        ("kl_loss_type",): "algorithm.kl_estimator (k1, k2, k3; low_var_kl is k3)",
        ("use_kl_in_reward",): "algorithm.kl_in (loss or reward)",
        ("entropy_coeff",): "algorithm.entropy_coef",
        ("ref_model_sync_steps", "sync_ref_model"): "algorithm.reference_refresh_steps",
        ("train_batch_size", "generation_batch_size"): "rollout.num_prompts (questions) and rollout.group_size",
        ("ppo_mini_batch_size", "steps_per_generation"): "algorithm.num_minibatches (parts of a rollout)",
        (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "ppo_micro_batch_size_per_gpu",
            "ppo_max_token_len_per_gpu",
        ): "memory.micro_batch_tokens (tokens of a pass; accumulation follows from it)",
        ("max_steps", "total_training_steps", "num_train_epochs", "total_epochs"): "run.steps",
        ("output_dir", "default_local_dir"): "run.dir",
        ("save_steps", "save_freq"): "checkpoint.every_steps",
        ("save_total_limit", "max_actor_ckpt_to_keep"): "checkpoint.keep",
        ("eval_steps", "test_freq"): "evaluation.every_steps",
        ("lr", "actor_lr"): "optimizer.learning_rate",
        ("lr_scheduler_type",): "optimizer.schedule",
        ("warmup_ratio", "lr_warmup_steps"): "optimizer.warmup_steps",
        ("max_grad_norm", "grad_clip"): "optimizer.max_grad_norm",
        ("use_vllm", "vllm_mode"): "rollout.engine: vllm, and vllm.mode; the native engine needs neither",
        (
            "free_cache_engine",
            "vllm_enable_sleep_mode",
        ): "memory.release_kv_cache, of the native engine; vLLM in the training processes always sleeps between rollouts",
        ("vllm_gpu_memory_utilization", "gpu_memory_utilization"): "vllm.gpu_memory_utilization",
        (
            "gradient_checkpointing",
            "enable_gradient_checkpointing",
        ): "memory.activation_checkpointing (a share of layers)",
        (
            "reward_funcs",
            "reward_model",
            "reward_weights",
            "custom_reward_function",
        ): "rewards (a list of function and weight)",
        ("report_to", "logger"): "logging.wandb and logging.tensorboard",
        ("resume_from_checkpoint", "resume_mode"): "run.resume",
        ("bf16", "fp16", "torch_dtype"): "model.dtype (auto: bfloat16 on GPUs, with float32 masters)",
        ("peft_config",): "lora (rank, alpha, target_modules)",
        ("logging_steps",): "logging.completions_every (of texts; metrics are written at each step)",
        (
            "adv_estimator",
        ): "algorithm.normalize_by_std (the advantage is the group's; docs/algorithms.md has its variants)",
        ("model_name_or_path",): "model.name",
        ("dataset_name", "train_files"): "data.name",
        ("val_files",): "data.eval_name",
        ("use_peft", "lora_r", "lora_rank"): "lora.rank",
        ("lora_alpha",): "lora.alpha",
        ("load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant"): "lora.quantization (nf4, beside lora.rank)",
        ("lora_target_modules",): "lora.target_modules",
    }.items()
    for name in names
}
"""By their names. docs/algorithms.md has the settings of each algorithm."""

ARGUMENTS = {
    "model": "config, the first argument: a name, a folder or a loaded model",
    "reward_funcs": "rewards, with weights as grpo.Reward(function, weight=...)",
    "args": 'settings, by our names: settings={"run.steps": 100} (`grpo settings max_steps` tells what a name of TRL is here)',
    "processing_class": "tokenizer, beside a loaded model; else the tokenizer lies where the model does",
    "reward_processing_classes": "args of the reward `reward_model`, which loads its own",
    "optimizers": "optimizer, a function from parameters to an optimizer; the schedule is optimizer.schedule in settings",
    "peft_config": 'lora in settings: {"lora.rank": 16}',
    "quantization_config": 'lora.quantization in settings: {"lora.rank": 16, "lora.quantization": "nf4"}',
    "environment_factory": "environment",
    "rollout_func": "environment or tools, for turns; the engine samples",
    "compute_loss_func": "loss, of Trainer",
    "compute_metrics": "rewards with weight=0, which are logged for training and held-out answers",
    "formatting_func": "data.form in settings",
    "data_collator": "left out: rows are packed without padding",
}
"""What TRL's trainers call an argument -> what it is here."""

CLASSES = {
    "GRPOTrainer": "grpo.Trainer(model, rewards=[...], train_dataset=..., settings={...})",
    "GRPOConfig": "settings of grpo.Trainer by name, or grpo.Config",
    "SFTTrainer": "grpo.SupervisedTrainer(model, train_dataset=..., settings={...})",
    "SFTConfig": "settings of grpo.SupervisedTrainer by name, or grpo.SupervisedConfig",
}
"""What TRL calls a class -> what it is here."""

SUPERVISED = {
    name: f"That is a name of TRL; here it is {ours}."
    for names, ours in {
        ("num_train_epochs",): "training.epochs",
        ("max_steps",): "run.steps",
        ("max_length", "max_seq_length"): "data.max_tokens (rows are never cut)",
        ("per_device_train_batch_size", "gradient_accumulation_steps"): "training.rows_per_update (and "
        "memory.micro_batch_tokens, the tokens of a pass)",
        ("packing", "packing_strategy", "padding_free"): "always so: rows are packed without padding",
        ("assistant_only_loss", "completion_only_loss"): "always so; data.loss_on tells all turns or the last",
        ("dataset_text_field", "formatting_func"): "data.form, with data.completion_column",
        ("lr_scheduler_type",): "optimizer.schedule",
        ("warmup_ratio",): "optimizer.warmup_steps",
        ("chat_template_path",): "data.chat_template",
    }.items()
    for name in names
}
"""The same of supervised training."""
