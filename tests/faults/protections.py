"""What protects each promise, and the tests that fail without it; `python -m tests.faults.unprotected` tries each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Protection:
    """A piece of code, what stands there when it is taken out, and the tests that must then fail."""

    numbers: tuple[int, ...]
    file: str
    text: str
    without: str
    tests: tuple[str, ...]


_HARVEST_DISK = (
    "tests/faults/test_harvest_resources.py::"
    "test_a_disk_that_fills_is_named_with_sizes_and_with_room_the_harvest_resumes"
)
_DATA = "tests/faults/test_training_data.py"

PROTECTIONS: tuple[Protection, ...] = (
    Protection(
        (1, 2),
        "harvest/pipeline.py",
        "        durable.sweep(target.path)\n",
        "",
        ("tests/faults/test_sweeps.py::test_a_harvest_killed_at_any_operation_resumes_to_the_same_store",),
    ),
    Protection(
        (1, 2),
        "harvest/ledger.py",
        "    except CorruptData:\n        return False\n    return True",
        "    except CorruptData:\n        return True\n    return True",
        ("tests/test_repair.py::test_verify_lists_every_damaged_file_and_a_new_run_heals",),
    ),
    Protection(
        (1, 7),
        "harvest/pipeline.py",
        "        plan.spool_path(target.path).unlink(missing_ok=True)\n",
        "",
        ("tests/faults/test_power.py::test_a_power_cut_in_a_harvest",),
    ),
    Protection(
        (2,),
        "shared/durable.py",
        "        for path in files:\n            os.replace(path.with_name(path.name + TEMPORARY), path)\n",
        "        for path, data in files.items():\n            _write_synced(path, data)\n",
        (
            "tests/faults/test_sweeps.py::test_a_harvest_killed_at_any_operation_resumes_to_the_same_store",
            "tests/test_durable.py::test_a_kill_at_any_call_leaves_the_old_file_or_the_new_one_and_sweep_clears_up",
        ),
    ),
    Protection(
        (4,),
        "train/loop.py",
        "            log.cut(self._first)\n",
        "            pass\n",
        ("tests/faults/test_sweeps.py::test_a_training_killed_at_any_operation_resumes_to_the_same_run",),
    ),
    Protection(
        (4,),
        "train/commands.py",
        "    if run.exists() and {path.name for path in run.iterdir()} - _BEFORE_CONFIG:",
        "    if run.exists():",
        ("tests/faults/test_sweeps.py::test_a_training_killed_at_any_operation_resumes_to_the_same_run",),
    ),
    Protection(
        (5,),
        "shared/signals.py",
        '("SIGINT", "SIGTERM", "SIGUSR1")',
        '("SIGINT", "SIGTERM")',
        (
            "tests/test_signals.py::test_signals_of_the_scheduler_are_among_them",
            "tests/faults/test_harvest_signals.py::test_a_signal_while_tokens_are_packed_stops_at_once",
        ),
    ),
    Protection(
        (5,),
        "shared/signals.py",
        "            raise KeyboardInterrupt\n",
        "            pass\n",
        ("tests/test_signals.py::test_only_a_second_ctrl_c_interrupts",),
    ),
    Protection(
        (5,),
        "shared/signals.py",
        "    os._exit(Stopped.exit_code)",
        "    sys.exit(Stopped.exit_code)",
        (
            "tests/test_signals.py::test_leaving_does_not_wait_for_threads",
            "tests/faults/test_harvest_signals.py::test_a_second_ctrl_c_ends_a_harvest_whose_passes_take_long",
        ),
    ),
    Protection(
        (5,),
        "harvest/capture.py",
        "            if stop:\n                return False\n",
        "",
        ("tests/test_capture.py::test_no_pass_is_begun_after_a_signal",),
    ),
    Protection(
        (5,),
        "harvest/runner.py",
        "            with stop_signals() as stop, bar:",
        "            stop: list[int] = []\n            with bar:",
        (
            "tests/faults/test_harvest_signals.py::test_a_signal_while_a_block_is_written_commits_it_and_says_how_to_go_on",
        ),
    ),
    Protection(
        (7,),
        "shared/durable.py",
        "            _write(file, part)\n        os.fsync(file.fileno())\n",
        "            _write(file, part)\n",
        (
            "tests/faults/test_power.py::test_a_power_cut_in_a_harvest",
            "tests/faults/test_power.py::test_images_of_a_mounted_file_system_are_what_a_power_cut_leaves",
        ),
    ),
    Protection(
        (7,),
        "shared/durable.py",
        "        for folder in sorted({path.parent for path in files}):\n            fsync_folder(folder)\n",
        "",
        ("tests/faults/test_power.py::test_a_power_cut_in_a_harvest",),
    ),
    Protection(
        (7,),
        "shared/durable.py",
        "            for name in names:\n                fsync_file(Path(folder, name))\n",
        "",
        ("tests/faults/test_power.py::test_a_power_cut_in_a_training_run",),
    ),
    Protection(
        (9,),
        "shared/durable.py",
        "        raise explain(error, next(iter(files)), sum(map(_size, files.values()))) from error",
        "        raise",
        (
            _HARVEST_DISK,
            "tests/faults/test_sweeps.py::test_a_disk_that_fills_at_any_write_of_a_harvest_is_named_and_it_resumes",
        ),
    ),
    Protection(
        (9,),
        "shared/durable.py",
        "_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}",
        "_FULL = {errno.ENOSPC}",
        (
            "tests/faults/test_harvest_resources.py::test_a_limit_on_the_size_of_files_is_told_as_a_full_disk",
            "tests/faults/test_harvest_resources.py::test_a_quota_that_is_used_up_is_told_as_a_full_disk",
        ),
    ),
    Protection(
        (14,),
        "shared/durable.py",
        "    try:\n        os.fsync(descriptor)\n    finally:",
        "    try:\n        with suppress(OSError):\n            os.fsync(descriptor)\n    finally:",
        ("tests/faults/test_sweeps.py::test_an_fsync_or_rename_that_fails_in_a_harvest_publishes_nothing",),
    ),
    Protection(
        (15,),
        "harvest/pipeline.py",
        "    if not force:\n        require_space([estimate(target, inputs",
        "    if False:\n        require_space([estimate(target, inputs",
        (
            "tests/faults/test_harvest_resources.py::"
            "test_a_store_that_would_not_fit_is_refused_before_the_model_is_loaded_and_force_goes_on",
        ),
    ),
    Protection(
        (16,),
        "harvest/capture.py",
        '            if "DefaultCPUAllocator" not in str(error):\n',
        "            if True:\n",
        ("tests/faults/test_harvest_resources.py::test_memory_that_a_pass_cannot_have_is_one_line",),
    ),
    Protection(
        (17,),
        "harvest/pipeline.py",
        "        _require_writable(target.path)\n",
        "",
        (
            "tests/faults/test_harvest_resources.py::"
            "test_a_read_only_disk_is_refused_and_an_unfinished_store_that_became_so",
        ),
    ),
    Protection(
        (17,),
        "shared/durable.py",
        '        raise UserError(f"cannot write to {path.parent}: {error.strerror}; choose another folder") from error',
        "        raise",
        ("tests/faults/test_harvest_resources.py::test_a_read_only_disk_is_told_before_the_model_is_touched",),
    ),
    Protection(
        (28, 29),
        "shared/durable.py",
        "            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)\n",
        "            pass\n",
        (
            "tests/faults/test_harvest_signals.py::test_a_second_harvester_is_told_at_once_who_the_first_is",
            "tests/test_train.py::test_two_trainers_on_one_run_folder_are_refused",
        ),
    ),
    Protection(
        (31,),
        "shared/store.py",
        'f"store {self.path.name}", shared=True, make=False)',
        'f"store {self.path.name}", make=False)',
        (f"{_DATA}::test_eight_trainers_at_once_get_what_each_gets_alone",),
    ),
    Protection(
        (32,),
        "harvest/capture.py",
        '        _check_finite(values, values, name, first, "the value is")\n',
        "",
        ("tests/faults/test_harvest_data.py::test_a_value_that_is_not_finite_is_named_by_layer_sequence_and_position",),
    ),
    Protection(
        (33,),
        "harvest/capture.py",
        '        _check_finite(stored, values, name, first, f"{storage} cannot hold the value")\n',
        "",
        (
            "tests/faults/test_harvest_data.py::"
            "test_a_value_that_the_stored_type_cannot_hold_is_an_error_before_it_is_written",
        ),
    ),
    Protection(
        (34,),
        "train/evaluate.py",
        "    if total > 1e-12 * scale:\n",
        "    if True:\n",
        (f"{_DATA}::test_degenerate_rows_have_defined_results",),
    ),
    Protection(
        (34,),
        "train/loop.py",
        "        return float(np.sqrt(variance.mean())) or 1.0",
        "        return float(np.sqrt(variance.mean()))",
        (f"{_DATA}::test_degenerate_rows_have_defined_results",),
    ),
    Protection(
        (36,),
        "train/transcoder.py",
        "                if k > d_sae:\n",
        "                if False:\n",
        ("tests/test_train.py::test_bad_input_is_one_line_and_writes_nothing",),
    ),
    Protection(
        (37,),
        "harvest/model_files.py",
        '    if re.match(r"[./~]", settings.name) or settings.name.count("/") > 1:',
        "    if False:",
        ("tests/test_harvest_input.py::test_bad_input_is_one_line",),
    ),
    Protection(
        (38,),
        "harvest/plan.py",
        "    if blocks == 0 or (not quota.skipped",
        "    if False and (not quota.skipped",
        ("tests/test_harvest_input.py::test_what_model_or_text_cannot_give",),
    ),
    Protection(
        (38,),
        "harvest/corpus.py",
        '    raise UserError(f"{name}: no rows; there is no text to harvest")',
        '    return "text"',
        ("tests/test_corpus.py::test_an_empty_file_has_no_text",),
    ),
    Protection(
        (40,),
        "harvest/rows.py",
        'line.decode("utf-8", "replace")',
        'line.decode("utf-8")',
        ("tests/test_corpus.py::test_bad_unicode_becomes_the_replacement_character",),
    ),
    Protection(
        (41,),
        "train/settings.py",
        "    if settings.rows.batch_rows > rows:",
        "    if False:",
        (f"{_DATA}::test_batches_of_one_row_and_of_all_rows",),
    ),
)

_CHECKPOINTS = "tests/faults/test_checkpoints.py"

PROTECTIONS += (
    Protection(
        (4,),
        "train/loop.py",
        "                for part in self._parts:\n                    part.load(tensors)",
        "                for part in self._parts[:2]:\n                    part.load(tensors)",
        (f"{_CHECKPOINTS}::test_a_signal_finishes_the_step_and_publishes",),
    ),
    Protection(
        (4,),
        "train/arithmetic.py",
        "    if differs := {name: value for name, value in recorded.items() if now.get(name) != value}:",
        "    if differs := {}:",
        (f"{_CHECKPOINTS}::test_other_arithmetic_is_refused_unless_asked_for",),
    ),
    Protection(
        (5,),
        "train/loop.py",
        "                last = stopping or done == settings.steps",
        "                last = done == settings.steps",
        (f"{_CHECKPOINTS}::test_a_signal_finishes_the_step_and_publishes",),
    ),
    Protection(
        (6,),
        "shared/durable.py",
        "    move(path, temporary)\n    shutil.rmtree(temporary)",
        "    shutil.rmtree(path)",
        (f"{_CHECKPOINTS}::test_a_kill_while_old_checkpoints_are_removed_leaves_valid_ones",),
    ),
    Protection(
        (6,),
        "train/loop.py",
        "        self._saver.prune()\n",
        "",
        (f"{_CHECKPOINTS}::test_what_a_kill_kept_from_being_removed_goes_when_the_run_is_resumed",),
    ),
    Protection(
        (8,),
        "train/checkpoint.py",
        "        wrong = verify(path)\n        if wrong is None:\n            return Checkpoint",
        "        wrong = None\n        if wrong is None:\n            return Checkpoint",
        (f"{_CHECKPOINTS}::test_torn_newest_checkpoints_are_skipped_with_a_warning_each",),
    ),
    Protection(
        (10, 11),
        "train/saver.py",
        "                if not self._make_room(",
        "                if True or not self._make_room(",
        (
            f"{_CHECKPOINTS}::test_a_full_disk_costs_old_checkpoints_and_training_goes_on",
            f"{_CHECKPOINTS}::test_what_does_not_verify_goes_first",
        ),
    ),
    Protection(
        (10,),
        "train/saver.py",
        "        except ProjectError as error:\n            self._failed()",
        "        except FileNotFoundError as error:\n            self._failed()",
        (f"{_CHECKPOINTS}::test_the_last_checkpoint_has_the_reserves_room",),
    ),
    Protection(
        (11,),
        "train/saver.py",
        "        self.wait()\n        self._reserve.unlink(missing_ok=True)\n        try:",
        "        self.wait()\n        try:",
        (f"{_CHECKPOINTS}::test_the_last_checkpoint_has_the_reserves_room",),
    ),
    Protection(
        (11,),
        "train/saver.py",
        "            if not self._fallback:\n",
        "            if True:\n",
        (f"{_CHECKPOINTS}::test_the_fallback_folder_takes_it_and_resume_brings_it_home",),
    ),
    Protection(
        (11,),
        "train/saver.py",
        "    if fallback.exists() and not (path.is_file() and path.read_bytes() == config):",
        "    if False:",
        (f"{_CHECKPOINTS}::test_a_fallback_folder_of_another_run_is_refused",),
    ),
    Protection(
        (12,),
        "train/metrics.py",
        "        except (DiskFull, OSError) as error:\n            if not self.lost_rows:",
        "        except FileNotFoundError as error:\n            if not self.lost_rows:",
        (f"{_CHECKPOINTS}::test_rows_and_reports_that_have_no_room_cost_a_warning_each",),
    ),
    Protection(
        (12,),
        "train/metrics.py",
        '            row = _parsed(line) if line.endswith(b"\\n") else None',
        "            row = json.loads(line)",
        (f"{_CHECKPOINTS}::test_a_torn_last_line_is_dropped_by_resume",),
    ),
    Protection(
        (14,),
        "train/saver.py",
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
        "train/checkpoint.py",
        "        refuse_links(path)\n",
        "",
        ("tests/faults/test_checkpoint_files.py::test_a_link_in_a_checkpoint_does_not_verify",),
    ),
    Protection(
        (24,),
        "train/checkpoint.py",
        "version not in (3, FORMAT_VERSION)",
        "version not in (FORMAT_VERSION,)",
        ("tests/faults/test_old_runs.py::test_a_run_of_format_3_is_listed_evaluated_and_resumed",),
    ),
    Protection(
        (25,),
        "train/checkpoint.py",
        "    if tensor.shape != like.shape or tensor.dtype != like.dtype:\n",
        "    if False:\n",
        (f"{_CHECKPOINTS}::test_a_wrong_tensor_of_the_optimizer_is_refused_by_name",),
    ),
    Protection(
        (35,),
        "train/loop.py",
        "        if (step := int(self._first_bad)) < _NEVER:",
        "        if (step := _NEVER) < _NEVER:",
        (f"{_CHECKPOINTS}::test_nothing_is_published_after_a_loss_that_is_not_finite",),
    ),
)

_CORRUPTION, _HOSTILE, _LINKS = (f"tests/faults/test_{name}.py" for name in ("corruption", "hostile", "links"))

PROTECTIONS += (
    Protection(
        (3,),
        "harvest/records.py",
        "    if found in (None, request):",
        "    if True:",
        ("tests/faults/test_requests.py::test_a_changed_request_is_refused_by_its_field",),
    ),
    Protection(
        (18,),
        "shared/checks.py",
        "    return None if found == record.crc32c else",
        "    return None if True else",
        (
            f"{_CORRUPTION}::test_a_damaged_chunk_is_named_by_every_command",
            "tests/faults/test_checkpoint_files.py::test_a_flipped_bit_is_named_and_never_loaded",
        ),
    ),
    Protection(
        (18,),
        "shared/checks.py",
        "            if size != spec.shard_bytes:",
        "            if False:",
        (f"{_CORRUPTION}::test_a_damaged_chunk_is_named_by_every_command",),
    ),
    Protection(
        (20,),
        "shared/checks.py",
        "    if found != expected:\n        wrong = next(",
        "    if False:\n        wrong = next(",
        (f"{_CORRUPTION}::test_edited_metadata_is_refused_and_left_alone",),
    ),
    Protection(
        (21,),
        "shared/bounds.py",
        "Count = Annotated[int, Field(ge=0, le=2**53)]",
        "Count = int",
        (f"{_HOSTILE}::test_no_number_of_a_record_may_be_negative_or_huge",),
    ),
    Protection(
        (21,),
        "shared/durable.py",
        "        if nests_too_deep(value):\n",
        "        if False:\n",
        (f"{_HOSTILE}::test_json_made_to_hurt_is_one_error",),
    ),
    Protection(
        (22,),
        "shared/files.py",
        "                if entry.is_symlink():\n",
        "                if False:\n",
        (f"{_LINKS}::test_a_link_anywhere_in_a_store_is_refused_and_not_followed",),
    ),
    Protection(
        (22,),
        "shared/bounds.py",
        "    if not plain or len(name) > 1024",
        "    if False and len(name) > 1024",
        (f"{_LINKS}::test_a_record_names_nothing_but_files_below_the_store",),
    ),
    Protection(
        (22,),
        "shared/files.py",
        " | os.O_NONBLOCK",
        "",
        (f"{_LINKS}::test_only_regular_files_are_read",),
    ),
    Protection(
        (23,),
        "shared/checks.py",
        "    if isinstance(version, int) and version != current:",
        "    if False:",
        ("tests/faults/test_formats.py::test_a_newer_store_asks_for_an_upgrade",),
    ),
    Protection(
        (24,),
        "shared/layout.py",
        "FORMAT_VERSION = 3",
        "FORMAT_VERSION = 4",
        ("tests/faults/test_formats.py::test_a_store_of_format_3_is_read_for_ever",),
    ),
    Protection(
        (26,),
        "train/checkpoint.py",
        "        return load(path.read_bytes())",
        "        return torch.load(__import__('io').BytesIO(path.read_bytes()), weights_only=False)",
        ("tests/faults/test_checkpoint_files.py::test_a_pickle_in_place_of_tensors_is_never_unpickled",),
    ),
    Protection(
        (27,),
        "harvest/encoding.py",
        "trust_remote_code=False",
        "trust_remote_code=True",
        ("tests/faults/test_hostile.py::test_no_module_unpickles_evaluates_or_trusts",),
    ),
    Protection(
        (30,),
        "shared/checks.py",
        'raise UserError(f"{path} is unfinished ({progress(path)});',
        'raise UserError(f"{path} is unfinished;',
        ("tests/faults/test_requests.py::test_a_reader_during_the_write_is_told_how_far_it_is",),
    ),
)

_MIRROR = "tests/faults/test_mirror.py"

PROTECTIONS += (
    Protection(
        (13,),
        "train/mirror/process.py",
        "    child = _start(run, project) if project else None",
        '    child = _start(run, project or "project")',
        (f"{_MIRROR}::test_off_is_off",),
    ),
    Protection(
        (13,),
        "train/mirror/process.py",
        "    if spec is None or spec.origin is None:",
        "    if False:",
        (f"{_MIRROR}::test_wandb_is_not_installed",),
    ),
    Protection(
        (19,),
        "harvest/ledger.py",
        "{target.path / ARRAYS / name: data for name, data in shards.items()}",
        "{target.path / ARRAYS / name: data for name, data in shards.items() if data[0].any()}",
        (f"{_CORRUPTION}::test_a_harvest_writes_the_chunks_that_are_zero",),
    ),
    Protection(
        (39,),
        "harvest/packing.py",
        "            tokens_left_over=self.tokens - kept - held_out,",
        "            tokens_left_over=0,",
        ("tests/test_packing.py::test_every_token_read_is_somewhere",),
    ),
)
