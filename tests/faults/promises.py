"""What is guaranteed for every fault, by number: a clear error and a non-zero exit code, or the right answer."""

PROMISES: dict[str, dict[int, str]] = {
    "Kill and resume": {
        1: "A harvest killed at a random point and resumed ends byte for byte the same as an uninterrupted one, and "
        "leaves no stray files.",
        2: "The same holds for a kill at every openat, write, fsync, rename and mkdir.",
        3: "A store whose request was changed, or that another request tries to continue, is refused; the error names "
        "the field.",
        4: "A training run killed anywhere, also while it writes a checkpoint, and resumed has the weights, optimizer "
        "state, metrics, reports and samples of an uninterrupted run, bit for bit; no step is missing or doubled.",
        5: "SIGTERM, SIGINT, SIGUSR1 and SIGHUP finish the step, publish a checkpoint or block, and exit with code 3; "
        "a second Ctrl-C exits at once.",
        6: "A kill after a checkpoint is published, before or while old ones are removed, leaves a valid one.",
        7: "After a power cut, whatever was published either verifies or is absent.",
        8: "If several of the newest checkpoints are damaged, the newest valid one is loaded, with a warning.",
    },
    "Disk and resources": {
        9: "If the disk fills up during a harvest, the error names the path, the bytes needed and the bytes free; with "
        "more space the harvest resumes.",
        10: "If the disk is full at a periodic checkpoint, the previous one is kept, superfluous ones are removed, the "
        "write is tried again, and training continues.",
        11: "If the disk is full at the last checkpoint, superfluous ones are removed, the write is tried again, and "
        "then the fallback folder is used; if all fails, the run ends with an error and the previous checkpoint loads.",
        12: "If the disk is full at a row of metrics or a report, that row or report is lost, with one warning; a last "
        "line that was cut off is tolerated.",
        13: "A full disk, a dead or stopped process, a missing network or a missing package of W&B changes no weight, "
        "and delays no step for longer than a fixed bound.",
        14: "If fsync or rename fails, nothing is published.",
        15: "A store or checkpoints that would not fit are refused before the model is loaded; --force overrides this.",
        16: "Being killed for lack of memory is like any other kill.",
        17: "An output folder that cannot be written to raises an error before the model is loaded.",
    },
    "Corruption and hostile input": {
        18: "A chunk that is cut off, empty, missing, too long, changed or swapped is named; repair rewrites only it.",
        19: "A chunk whose values are really all zeros is not mistaken for a missing one.",
        20: "Array metadata with another dtype, byte order or shape, or no metadata, is refused and never rewritten.",
        21: "JSON that is cut off, has duplicate keys, NaN, 1e999, deep nesting, unknown keys, negative or huge "
        "numbers is one clear error.",
        22: "Names with `..`, absolute paths, NUL, and links out of a store or a run neither open nor change anything "
        "outside it; no pipe blocks a command.",
        23: "A newer format is refused; the error names it and the format that can be read, and asks for an upgrade.",
        24: "An older format is read.",
        25: "A checkpoint with wrong names, shapes or dtypes, NaN or a changed bit is refused; the error names the "
        "tensor.",
        26: "A pickle in place of a checkpoint is never unpickled.",
        27: "Code that comes with a model is never run.",
    },
    "Concurrency": {
        28: "If a second harvest writes to the same store, it is refused at once.",
        29: "If a second trainer writes to the same run, it is refused at once.",
        30: "Reading a store that is still being written raises an error that gives its progress.",
        31: "Several trainers that share a store at the same time get the same results as each alone.",
    },
    "Data": {
        32: "NaN or infinity in an activation stops the harvest; the error names layer, sequence and position.",
        33: "A value too large for the stored type raises an error before it is written.",
        34: "Negative, constant and zero-variance batches have defined results.",
        35: "A loss that is not finite stops the training and publishes nothing; the error names the batch.",
        36: "Widths that do not match, k above d_sae and bad prefixes are refused before memory is allocated; the "
        "error gives both numbers.",
        37: "A missing model or tokenizer is a one-line error: what, where it was looked for, how to supply it.",
        38: "An empty corpus publishes no store.",
        39: "With documents shorter or longer than the context, every token is accounted for.",
        40: "A missing text column is a one-line error that lists the columns; bad Unicode is replaced and counted.",
        41: "A batch larger than the store, a store of one row, or a resume past the end gives a clear error or a "
        "clean finish.",
        42: "A damaged row of a store (not finite, or longer than the statistics allow), held out or trained on, "
        "raises an error that names shard and row; no figure is computed from it. When a run opens its store, shard "
        "files are compared with their checksums: 256 MiB each of held-out and of training blocks, all with --verify.",
        43: "Lost rows of a run's logs are reported by resume and by the report; a damaged row or record is named "
        "once, and left out by watch, report, compare and resume.",
        44: "Samples have a checksum for every page, and a damaged file of samples is refused.",
        45: "After a store was moved, --store is needed once; every later command of the run finds it.",
    },
    "Records that belong together": {
        46: "A run is not resumed, evaluated or compared on a store with other rows, even under the same name; the "
        "error names the block that differs.",
        47: "A run whose config.json differs from what its checkpoints were trained with is refused; the error names "
        "the field. A run that `resume --steps` made longer records that.",
        48: "A checkpoint whose state.json was edited does not verify.",
        49: "If a run is removed or renamed while it trains, the trainer ends with an error, and writes nothing in its "
        "place.",
    },
    "Text and tokens": {
        50: "Bytes that are not UTF-8 are decoded if the encoding is certain; otherwise the error names the file. "
        "Replaced characters are counted, and many of them cause a warning.",
        51: "Padding in given token ids is never stored as text, with or without an attention mask.",
        52: "A row that is not a document raises an error that names file and row; it is skipped only on request, and "
        "counted.",
        53: "A token for which the model has no embedding is a one-line error before the model is loaded.",
        54: "Joined documents are separated by EOS, also if EOS and BOS are one token, unless set otherwise.",
    },
    "Untrusted models and names": {
        55: "Names and texts from others reach a terminal as plain text: no markup, no control sequences.",
        56: "A model's rows are those of plain transformers, or the model is refused; an unusual model folder is a "
        "one-line error.",
    },
    "Diverged runs, renamed stores": {
        57: "A run that diverges (fvu above 10; predicting the mean gives 1) warns as soon as it does, ends with an "
        "error, and its report says so.",
        58: "A harvest continues a store with the same content, whatever its folder, its model or its text are called; "
        "if the model has moved, the error asks for it.",
    },
    "Rows from elsewhere": {
        59: "Files to import that are cut off, pickled, or do not match their pairs in shape or length are refused "
        "before anything is written; for a row that is not finite the error names the file. An interrupted import "
        "continues and ends byte for byte the same. Damage is repaired from the same files, and from no others.",
    },
    "Object storage, several processes, the hub": {
        60: "A harvest into object storage that is killed at any request, or whose requests fail, or succeed but "
        "report an error, leaves no record of anything that is not there; run again, it ends byte for byte the same as "
        "a local one. Two harvests never write to one store; one that loses its lease commits nothing more.",
        61: "A run from object storage that is killed at any request and resumed has the weights of a run from the "
        "local store. Failed requests are repeated; a service that does not answer ends the run with exit code 3; the "
        "local folder stays within its bound; damaged objects are named.",
        62: "If one of several processes of a training run or a harvest is killed, the others end with an error and "
        "the last checkpoint or block, and any number of processes continues from there to the same bytes.",
        63: "A push to the hub or a pull from it continues after a kill; no damaged file is pushed, and an incomplete "
        "download is never taken for complete; a full disk ends a pull in a state that can continue.",
        64: "Packing, unpacking and repairing in object storage, killed at any request, leave no record of anything "
        "that is not there; the same command ends byte for byte the same as on local folders. They refuse a store "
        "that another process writes, and stop if they lose their lease.",
    },
}
