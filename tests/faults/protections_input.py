"""What protects against damaged and hostile input."""

from tests.faults.protection import Protection

_CORRUPTION, _HOSTILE, _LINKS = (f"tests/faults/test_{name}.py" for name in ("corruption", "hostile", "links"))

INPUT = (
    Protection(
        (3,),
        "harvest/writer/recover_records.py",
        "    if found in (None, request):",
        "    if True:",
        ("tests/faults/test_requests.py::test_a_changed_request_is_refused_by_its_field",),
    ),
    Protection(
        (18,),
        "shared/store/checks.py",
        "    return None if found == record.crc32c else",
        "    return None if True else",
        (
            f"{_CORRUPTION}::test_a_damaged_chunk_is_named_by_every_command",
            "tests/faults/test_checkpoint_files.py::test_a_flipped_bit_is_named_and_never_loaded",
        ),
    ),
    Protection(
        (18,),
        "shared/store/checks.py",
        "            if size != spec.shard_bytes:",
        "            if False:",
        (f"{_CORRUPTION}::test_a_damaged_chunk_is_named_by_every_command",),
    ),
    Protection(
        (20,),
        "shared/store/checks.py",
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
        "shared/files/durable.py",
        "        if nests_too_deep(value):\n",
        "        if False:\n",
        (f"{_HOSTILE}::test_json_made_to_hurt_is_one_error",),
    ),
    Protection(
        (22,),
        "shared/files/untrusted.py",
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
        "shared/files/untrusted.py",
        " | os.O_NONBLOCK",
        "",
        (f"{_LINKS}::test_only_regular_files_are_read",),
    ),
    Protection(
        (23,),
        "shared/store/checks.py",
        "    if isinstance(version, int) and version != current:",
        "    if False:",
        ("tests/faults/test_formats.py::test_a_newer_store_asks_for_an_upgrade",),
    ),
    Protection(
        (24,),
        "shared/store/layout.py",
        "FORMAT_VERSION = 3",
        "FORMAT_VERSION = 4",
        ("tests/faults/test_formats.py::test_a_store_of_format_3_is_read_for_ever",),
    ),
    Protection(
        (26,),
        "train/model/checkpoint.py",
        "        return load(path.read_bytes())",
        "        return torch.load(__import__('io').BytesIO(path.read_bytes()), weights_only=False)",
        ("tests/faults/test_checkpoint_files.py::test_a_pickle_in_place_of_tensors_is_never_unpickled",),
    ),
    Protection(
        (27,),
        "harvest/text/tokenizer_files.py",
        "trust_remote_code=False",
        "trust_remote_code=True",
        ("tests/faults/test_hostile.py::test_no_module_unpickles_evaluates_or_trusts",),
    ),
    Protection(
        (30,),
        "shared/store/checks.py",
        'raise UserError(f"{path} is unfinished ({progress(path)});',
        'raise UserError(f"{path} is unfinished;',
        ("tests/faults/test_requests.py::test_a_reader_during_the_write_is_told_how_far_it_is",),
    ),
    Protection(
        (19,),
        "harvest/writer/ledger.py",
        "{target.path / ARRAYS / name: data for name, data in shards.items()}",
        "{target.path / ARRAYS / name: data for name, data in shards.items() if data[0].any()}",
        (f"{_CORRUPTION}::test_a_harvest_writes_the_chunks_that_are_zero",),
    ),
    Protection(
        (39,),
        "harvest/text/packing.py",
        "            tokens_left_over=self.tokens - kept - held_out,",
        "            tokens_left_over=0,",
        ("tests/test_packing.py::test_every_token_read_is_somewhere",),
    ),
)
