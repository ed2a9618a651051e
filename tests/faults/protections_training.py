"""What protects a training run: checkpoints, the logs, the sync."""

from tests.faults.protection import Protection

_CHECKPOINTS = "tests/faults/test_checkpoints.py"
_SYNC = "tests/faults/test_wandb_sync.py"
_HELD_OUT = "tests/faults/test_held_out_rows.py"
_LOST = "tests/faults/test_lost_rows.py"

TRAINING = (
    Protection(
        (4,),
        "train/run/trainer.py",
        "                for part in self._parts:\n                    part.load(tensors)",
        "                for part in self._parts[:2]:\n                    part.load(tensors)",
        (f"{_CHECKPOINTS}::test_a_signal_finishes_the_step_and_publishes",),
    ),
    Protection(
        (4,),
        "train/run/determinism.py",
        "    if differs := {name: value for name, value in recorded.items() if now.get(name) != value}:",
        "    if differs := {}:",
        ("tests/faults/test_checkpoint_contents.py::test_other_arithmetic_is_refused_unless_asked_for",),
    ),
    Protection(
        (5,),
        "train/run/trainer.py",
        "        last = stopping or done == self._settings.steps",
        "        last = done == self._settings.steps",
        (f"{_CHECKPOINTS}::test_a_signal_finishes_the_step_and_publishes",),
    ),
    Protection(
        (6,),
        "shared/files/durable.py",
        "    move(path, temporary)\n    shutil.rmtree(temporary)",
        "    shutil.rmtree(path)",
        (f"{_CHECKPOINTS}::test_a_kill_while_old_checkpoints_are_removed_leaves_valid_ones",),
    ),
    Protection(
        (6,),
        "train/run/trainer.py",
        "        self._saver.prune()\n",
        "",
        (f"{_CHECKPOINTS}::test_what_a_kill_kept_from_being_removed_goes_when_the_run_is_resumed",),
    ),
    Protection(
        (8,),
        "train/model/checkpoint.py",
        "        wrong = verify(path)\n        if wrong is None:\n            return Checkpoint",
        "        wrong = None\n        if wrong is None:\n            return Checkpoint",
        (f"{_CHECKPOINTS}::test_torn_newest_checkpoints_are_skipped_with_a_warning_each",),
    ),
    Protection(
        (10, 11),
        "train/run/saver.py",
        "                if not self._make_room(",
        "                if True or not self._make_room(",
        (
            f"{_CHECKPOINTS}::test_a_full_disk_costs_old_checkpoints_and_training_goes_on",
            f"{_CHECKPOINTS}::test_what_does_not_verify_goes_first",
        ),
    ),
    Protection(
        (10,),
        "train/run/saver.py",
        "        except ProjectError as error:\n            self._failed()",
        "        except FileNotFoundError as error:\n            self._failed()",
        (f"{_CHECKPOINTS}::test_the_last_checkpoint_has_the_reserves_room",),
    ),
    Protection(
        (11,),
        "train/run/saver.py",
        "        self.wait()\n        self._reserve.unlink(missing_ok=True)\n        try:",
        "        self.wait()\n        try:",
        (f"{_CHECKPOINTS}::test_the_last_checkpoint_has_the_reserves_room",),
    ),
    Protection(
        (11,),
        "train/run/saver.py",
        "            if not self._fallback:\n",
        "            if True:\n",
        (f"{_CHECKPOINTS}::test_the_fallback_folder_takes_it_and_resume_brings_it_home",),
    ),
    Protection(
        (11,),
        "train/run/saver.py",
        "    if fallback.exists() and not (path.is_file() and path.read_bytes() == config):",
        "    if False:",
        (f"{_CHECKPOINTS}::test_a_fallback_folder_of_another_run_is_refused",),
    ),
    Protection(
        (12,),
        "train/run/metrics.py",
        "        except (ProjectError, OSError) as error:\n            if not self.lost_rows:",
        "        except FileNotFoundError as error:\n            if not self.lost_rows:",
        (f"{_CHECKPOINTS}::test_rows_and_reports_that_have_no_room_cost_a_warning_each",),
    ),
    Protection(
        (12,),
        "train/run/metrics.py",
        '            if not line.endswith(b"\\n"):\n                continue\n',
        "",
        (f"{_CHECKPOINTS}::test_a_torn_last_line_is_dropped_by_resume",),
    ),
    Protection(
        (14,),
        "train/run/saver.py",
        "        except (DiskFull, OSError) as error:\n            if not self._fallback:",
        "        except DiskFull as error:\n            if not self._fallback:",
        (f"{_CHECKPOINTS}::test_an_error_of_the_disk_costs_that_checkpoint",),
    ),
    Protection(
        (15,),
        "train/commands.py",
        "    if not force:\n        size = checkpoint_bytes",
        "    if False:\n        size = checkpoint_bytes",
        (f"{_CHECKPOINTS}::test_checkpoints_that_would_not_fit_are_refused_with_what_the_policy_takes",),
    ),
    Protection(
        (22,),
        "train/model/checkpoint.py",
        "        refuse_links(path)\n",
        "",
        ("tests/faults/test_checkpoint_files.py::test_a_link_in_a_checkpoint_does_not_verify",),
    ),
    Protection(
        (24,),
        "train/model/checkpoint.py",
        "not 3 <= version <= FORMAT_VERSION",
        "version != FORMAT_VERSION",
        ("tests/faults/test_old_runs.py::test_a_run_of_format_3_is_listed_evaluated_and_resumed",),
    ),
    Protection(
        (25,),
        "train/model/saved_tensors.py",
        "    if tensor.shape != like.shape or tensor.dtype != like.dtype:\n",
        "    if False:\n",
        ("tests/faults/test_checkpoint_contents.py::test_a_wrong_tensor_of_the_optimizer_is_refused_by_name",),
    ),
    Protection(
        (35,),
        "train/run/bad_rows.py",
        "        if (step := int(self.first)) < _NEVER:",
        "        if (step := _NEVER) < _NEVER:",
        (f"{_CHECKPOINTS}::test_nothing_is_published_after_a_loss_that_is_not_finite",),
    ),
    Protection(
        (13,),
        "train/wandb_sync/sync.py",
        "    child = _start(run, project) if project else None",
        '    child = _start(run, project or "project")',
        (f"{_SYNC}::test_off_is_off",),
    ),
    Protection(
        (13,),
        "train/wandb_sync/sync.py",
        "    if spec is None or spec.origin is None:",
        "    if False:",
        (f"{_SYNC}::test_wandb_is_not_installed",),
    ),
    Protection(
        (42,),
        "train/data/batches.py",
        "                checks.add(extent, side, rows)\n",
        "",
        (f"{_HELD_OUT}::test_a_held_out_row_that_the_statistics_do_not_allow_is_named",),
    ),
    Protection(
        (42,),
        "train/run/load_run.py",
        "    check_shards(store, config.training_blocks if same else store.record.training_blocks, verify=verify)\n",
        "",
        (f"{_HELD_OUT}::test_a_flipped_bit_of_a_held_out_row_is_named_by_its_checksum",),
    ),
    Protection(
        (43,),
        "train/live/log_rows.py",
        "    read_record(model, row, log)\n",
        "",
        (f"{_LOST}::test_a_row_that_is_none_is_named_once_and_left_out",),
    ),
    Protection(
        (44,),
        "train/samples/parquet.py",
        ", page_checksum_verification=True",
        "",
        (f"{_LOST}::test_no_flipped_bit_of_samples_is_read_as_other_data",),
    ),
    Protection(
        (44,),
        "train/samples/parquet.py",
        ' not in (b"", _schema_digest(table.schema)):',
        " is None:",
        (f"{_LOST}::test_no_flipped_bit_of_samples_is_read_as_other_data",),
    ),
    Protection(
        (49,),
        "shared/files/durable.py",
        "        if path in _STAYING:",
        "        if False:",
        (
            "tests/test_bindings.py::"
            "test_a_run_that_is_renamed_while_something_of_it_is_written_is_not_begun_again_in_its_old_place",
        ),
    ),
    Protection(
        (57,),
        "train/run/metrics.py",
        "    return not fvu <= DIVERGED",
        "    return False",
        (
            "tests/faults/test_divergence.py::"
            "test_a_training_that_diverges_says_so_at_once_at_its_end_and_in_its_report",
        ),
    ),
)
