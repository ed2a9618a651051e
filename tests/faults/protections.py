"""What protects each promise, and the tests that fail without it; `python -m tests.faults.unprotected` tries each."""

from tests.faults.protection import Protection
from tests.faults.protections_input import INPUT
from tests.faults.protections_training import TRAINING

_HARVEST_DISK = (
    "tests/faults/test_harvest_resources.py::"
    "test_a_disk_that_fills_is_named_with_sizes_and_with_room_the_harvest_resumes"
)
_DATA = "tests/faults/test_training_data.py"

PROTECTIONS: tuple[Protection, ...] = (
    *TRAINING,
    *INPUT,
    Protection(
        (1, 2),
        "harvest/run/pipeline.py",
        "        durable.sweep(target.path)\n",
        "",
        ("tests/faults/test_sweeps.py::test_a_harvest_killed_at_any_operation_resumes_to_the_same_store",),
    ),
    Protection(
        (1, 2),
        "harvest/writer/ledger.py",
        "    except CorruptData:\n        return False\n    return True",
        "    except CorruptData:\n        return True\n    return True",
        ("tests/test_repair.py::test_verify_lists_every_damaged_file_and_a_new_run_heals",),
    ),
    Protection(
        (1, 7),
        "harvest/run/pipeline.py",
        "        spool_path(target.path).unlink(missing_ok=True)\n",
        "",
        ("tests/faults/test_power.py::test_a_power_cut_in_a_harvest",),
    ),
    Protection(
        (2,),
        "shared/files/durable.py",
        "        for path in files:\n            os.replace(path.with_name(path.name + TEMPORARY), path)\n",
        "        for path, data in files.items():\n            _write_synced(path, data)\n",
        (
            "tests/faults/test_sweeps.py::test_a_harvest_killed_at_any_operation_resumes_to_the_same_store",
            "tests/test_durable.py::test_a_kill_at_any_call_leaves_the_old_file_or_the_new_one_and_sweep_clears_up",
        ),
    ),
    Protection(
        (4,),
        "train/run/training_log.py",
        "            log.cut(first)\n",
        "            pass\n",
        ("tests/faults/test_sweeps.py::test_a_training_killed_at_any_operation_resumes_to_the_same_run",),
    ),
    Protection(
        (4,),
        "train/run_folder.py",
        "    if run.exists() and {path.name for path in run.iterdir()} - _BEFORE_CONFIG:",
        "    if run.exists():",
        ("tests/faults/test_sweeps.py::test_a_training_killed_at_any_operation_resumes_to_the_same_run",),
    ),
    Protection(
        (5,),
        "shared/console/signals.py",
        '("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")',
        '("SIGINT", "SIGTERM")',
        (
            "tests/test_signals.py::test_signals_of_the_scheduler_are_among_them",
            "tests/faults/test_harvest_signals.py::test_a_signal_while_tokens_are_packed_stops_at_once",
        ),
    ),
    Protection(
        (5,),
        "shared/console/signals.py",
        "            raise KeyboardInterrupt\n",
        "            pass\n",
        ("tests/test_signals.py::test_only_a_second_ctrl_c_interrupts",),
    ),
    Protection(
        (5,),
        "shared/console/signals.py",
        "    os._exit(Stopped.exit_code)",
        "    sys.exit(Stopped.exit_code)",
        (
            "tests/test_signals.py::test_leaving_does_not_wait_for_threads",
            "tests/faults/test_harvest_signals.py::test_a_second_ctrl_c_ends_a_harvest_whose_passes_take_long",
        ),
    ),
    Protection(
        (5,),
        "harvest/run/capture.py",
        "            if stop:\n                return False\n",
        "",
        ("tests/test_capture.py::test_no_pass_is_begun_after_a_signal",),
    ),
    Protection(
        (5,),
        "harvest/run/runner.py",
        "            with stop_signals() as stop, bar:",
        "            stop: list[int] = []\n            with bar:",
        (
            "tests/faults/test_harvest_signals.py::test_a_signal_while_a_block_is_written_commits_it_and_says_how_to_go_on",
        ),
    ),
    Protection(
        (7,),
        "shared/files/durable.py",
        "            _write(file, part)\n        os.fsync(file.fileno())\n",
        "            _write(file, part)\n",
        (
            "tests/faults/test_power.py::test_a_power_cut_in_a_harvest",
            "tests/faults/test_power.py::test_images_of_a_mounted_file_system_are_what_a_power_cut_leaves",
        ),
    ),
    Protection(
        (7,),
        "shared/files/durable.py",
        "        for folder in sorted({path.parent for path in files}):\n            fsync_folder(folder)\n",
        "",
        ("tests/faults/test_power.py::test_a_power_cut_in_a_harvest",),
    ),
    Protection(
        (7,),
        "shared/files/durable.py",
        "            for name in names:\n                fsync_file(Path(folder, name))\n",
        "",
        ("tests/faults/test_power.py::test_a_power_cut_in_a_training_run",),
    ),
    Protection(
        (9,),
        "shared/files/durable.py",
        "        raise explain(error, next(iter(files)), sum(map(_size, files.values()))) from error",
        "        raise",
        (
            _HARVEST_DISK,
            "tests/faults/test_sweeps.py::test_a_disk_that_fills_at_any_write_of_a_harvest_is_named_and_it_resumes",
        ),
    ),
    Protection(
        (9,),
        "shared/files/durable.py",
        "_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}",
        "_FULL = {errno.ENOSPC}",
        (
            "tests/faults/test_harvest_resources.py::test_a_limit_on_the_size_of_files_is_told_as_a_full_disk",
            "tests/faults/test_harvest_resources.py::test_a_quota_that_is_used_up_is_told_as_a_full_disk",
        ),
    ),
    Protection(
        (14,),
        "shared/files/durable.py",
        "    try:\n        os.fsync(descriptor)\n    finally:",
        "    try:\n        with suppress(OSError):\n            os.fsync(descriptor)\n    finally:",
        ("tests/faults/test_sweeps.py::test_an_fsync_or_rename_that_fails_in_a_harvest_publishes_nothing",),
    ),
    Protection(
        (15,),
        "harvest/run/pipeline.py",
        "    if not force:\n        require_space([estimate(target, inputs",
        "    if False:\n        require_space([estimate(target, inputs",
        (
            "tests/faults/test_harvest_resources.py::"
            "test_a_store_that_would_not_fit_is_refused_before_the_model_is_loaded_and_force_goes_on",
        ),
    ),
    Protection(
        (16,),
        "harvest/run/capture.py",
        '            if "DefaultCPUAllocator" not in str(error):\n',
        "            if True:\n",
        ("tests/faults/test_harvest_resources.py::test_memory_that_a_pass_cannot_have_is_one_line",),
    ),
    Protection(
        (17,),
        "harvest/run/pipeline.py",
        "        _require_writable(target.path)\n",
        "",
        (
            "tests/faults/test_harvest_resources.py::"
            "test_a_read_only_disk_is_refused_and_an_unfinished_store_that_became_so",
        ),
    ),
    Protection(
        (17,),
        "shared/files/durable.py",
        '        raise UserError(f"cannot write to {path.parent}: {error.strerror}; choose another folder") from error',
        "        raise",
        ("tests/faults/test_harvest_resources.py::test_a_read_only_disk_is_told_before_the_model_is_touched",),
    ),
    Protection(
        (28, 29),
        "shared/files/durable.py",
        "            _take(descriptor, kind)\n",
        "            pass\n",
        (
            "tests/faults/test_harvest_signals.py::test_a_second_harvester_is_told_at_once_who_the_first_is",
            "tests/test_train.py::test_two_trainers_on_one_run_folder_are_refused",
        ),
    ),
    Protection(
        (31,),
        "shared/store/store.py",
        'f"store {self.path.name}", shared=True, make=False)',
        'f"store {self.path.name}", make=False)',
        (f"{_DATA}::test_eight_trainers_at_once_get_what_each_gets_alone",),
    ),
    Protection(
        (32,),
        "harvest/run/stored_values.py",
        '        _check_finite(values, values, name, first, "the value is")\n',
        "",
        ("tests/faults/test_harvest_data.py::test_a_value_that_is_not_finite_is_named_by_layer_sequence_and_position",),
    ),
    Protection(
        (33,),
        "harvest/run/stored_values.py",
        '        _check_finite(stored, values, name, first, f"{storage} cannot hold the value")\n',
        "",
        (
            "tests/faults/test_harvest_data.py::"
            "test_a_value_that_the_stored_type_cannot_hold_is_an_error_before_it_is_written",
        ),
    ),
    Protection(
        (34,),
        "train/evaluation/evaluate.py",
        "    if total > 1e-12 * scale:\n",
        "    if True:\n",
        (f"{_DATA}::test_degenerate_rows_have_defined_results",),
    ),
    Protection(
        (34,),
        "train/model/normalisation.py",
        "    return float(np.sqrt(variance.mean())) or 1.0",
        "    return float(np.sqrt(variance.mean()))",
        (f"{_DATA}::test_degenerate_rows_have_defined_results",),
    ),
    Protection(
        (36,),
        "train/model/sizes.py",
        "        if value > d_sae:\n",
        "        if False:\n",
        ("tests/test_train.py::test_bad_input_is_one_line_and_writes_nothing",),
    ),
    Protection(
        (37,),
        "harvest/llm/model_files.py",
        '    if re.match(r"[./~]", settings.name) or settings.name.count("/") > 1:',
        "    if False:",
        ("tests/test_harvest_input.py::test_bad_input_is_one_line",),
    ),
    Protection(
        (38,),
        "harvest/writer/tokens.py",
        "    if blocks == 0 or (not quota.skipped",
        "    if False and (not quota.skipped",
        ("tests/test_harvest_input.py::test_what_model_or_text_cannot_give",),
    ),
    Protection(
        (38,),
        "harvest/text/corpus.py",
        '    return UserError(f"{name}: no rows; there is no text to harvest")',
        '    return UserError("")',
        ("tests/test_corpus.py::test_an_empty_file_has_no_text",),
    ),
    Protection(
        (40,),
        "harvest/text/dataset_rows.py",
        'line.decode("utf-8", "replace")',
        'line.decode("utf-8")',
        ("tests/test_corpus.py::test_bad_unicode_becomes_the_replacement_character",),
    ),
    Protection(
        (41,),
        "train/run/rules.py",
        "    if rows.batch_rows > there:",
        "    if False:",
        (f"{_DATA}::test_batches_of_one_row_and_of_all_rows",),
    ),
    Protection(
        (60,),
        "harvest/run/object_cache.py",
        '        remove_of_dead(objects, f"{name}.lock")\n',
        "        pass\n",
        ("tests/faults/test_object_storage.py::test_a_harvest_that_is_killed_at_a_request_ends_the_same",),
    ),
    Protection(
        (60,),
        "harvest/run/object_cache.py",
        "return 1 if is_shard(name) and not name.startswith(_ROWS) else 3",
        "return 1 if is_shard(name) and not name.startswith(_ROWS) else 3 if name.endswith('.json') else 4",
        ("tests/faults/test_object_storage.py::test_a_harvest_that_is_killed_at_a_request_ends_the_same",),
    ),
    Protection(
        (64,),
        "harvest/commands/archive_target.py",
        "        self._lease.require()\n        self._objects.put(name, data)\n",
        "        self._objects.put(name, data)\n",
        ("tests/test_object_archive.py::test_a_pack_that_loses_its_lease_writes_nothing_more",),
    ),
    Protection(
        (64,),
        "harvest/commands/archive_target.py",
        "        if not ours and objects.sizes():\n",
        "        if False:\n",
        ("tests/test_object_archive.py::test_what_cannot_be_written_is_said",),
    ),
    Protection(
        (64,),
        "harvest/run/object_cache.py",
        "        def one(file: Path) -> None:\n            lease.require()\n",
        "        def one(file: Path) -> None:\n",
        ("tests/test_object_repair.py::test_a_repair_that_loses_its_lease_commits_nothing_more_and_another_finishes",),
    ),
    Protection(
        (61,),
        "shared/store/object_rows.py",
        "            if wrong := _wrong(data, self._record(spec, piece.shard)):\n",
        "            if wrong := None:\n",
        ("tests/test_objects.py::test_damaged_objects_are_found_on_arrival",),
    ),
    Protection(
        (61,),
        "shared/store/piece_folder.py",
        "            if taken + size > self._most:\n",
        "            if False:\n",
        ("tests/test_objects.py::test_training_gives_the_same_bytes_and_the_folder_keeps_its_bound",),
    ),
    Protection(
        (62,),
        "train/parallel/ranks.py",
        "        except RuntimeError as error:\n",
        "        except ZeroDivisionError as error:\n",
        ("tests/test_parallel.py::test_processes_train_the_run_of_one_and_others_carry_it_on",),
    ),
    Protection(
        (63,),
        "harvest/commands/hub_store.py",
        "                if file in records and (wrong := fault(root / file, records[file])):\n",
        "                if wrong := None:\n",
        ("tests/test_hub_store.py::test_a_damaged_file_is_not_pushed",),
    ),
)
