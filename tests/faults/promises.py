"""What is promised of every fault, by number: a clear error and a non-zero exit code, or the right answer."""

PROMISES: dict[str, dict[int, str]] = {
    "Kill and resume": {
        1: "A harvest killed at a random point and resumed is byte for byte the uninterrupted store, without litter.",
        2: "The same for a kill at every openat, write, fsync, rename and mkdir.",
        3: "A store whose request was changed, or that is continued by another request, is refused by field.",
        4: "A training killed anywhere, also inside a checkpoint, and resumed has the weights, optimizer state, "
        "metrics, reports and samples of the uninterrupted run, bit for bit; no step is missing or doubled.",
        5: "SIGTERM, SIGINT, SIGUSR1 and SIGHUP finish the step, publish, and exit with code 3; a second Ctrl-C exits "
        "at once.",
        6: "A kill between publishing a checkpoint and removing old ones, or during that, leaves a valid one.",
        7: "After a power cut, what was published verifies or is absent.",
        8: "Of several torn newest checkpoints, the newest valid one is loaded, with a warning.",
    },
    "Disk and resources": {
        9: "A full disk while harvesting names the path, the bytes needed and those free; with space it resumes.",
        10: "A full disk at a periodic checkpoint keeps the one before, removes extras, tries again, and trains on.",
        11: "A full disk at the last checkpoint removes extras, tries again, takes the fallback folder, or exits with "
        "an error and the checkpoint before loadable.",
        12: "A full disk at a row of metrics or a report costs that and one warning; a torn last line is tolerated.",
        13: "The tracker's full disk, dead or stopped process, missing network or missing package change no weight and "
        "delay no step without bound.",
        14: "An fsync or rename that fails publishes nothing.",
        15: "A store or checkpoints that would not fit are refused before the model is loaded; --force goes on.",
        16: "A kill for want of memory is like any other kill.",
        17: "An output folder that cannot be written to is an error before the model is loaded.",
    },
    "Corruption and hostile input": {
        18: "A chunk that is cut, empty, missing, longer, changed or swapped is named; repair makes it alone again.",
        19: "A chunk that is all zeros by right is there.",
        20: "An array's metadata with another dtype, byte order or shape, or none, is refused and never made again.",
        21: "JSON that is cut, has duplicate keys, NaN, 1e999, deep nesting, unknown keys, negative or huge numbers is "
        "one clear error.",
        22: "Names with `..`, absolute paths, NUL, and links out of a store or a run open and change nothing outside; "
        "no pipe is waited for.",
        23: "A newer format is named, with the one that is read, and asks for an upgrade.",
        24: "An older format is read.",
        25: "A checkpoint with wrong names, shapes, dtypes, NaN or a changed bit is refused with the tensor's name.",
        26: "A pickle in place of a checkpoint is never unpickled.",
        27: "Code that comes with a model is never run.",
    },
    "Concurrency": {
        28: "Of two harvesters of one store, the second is told at once.",
        29: "Of two trainers of one run, likewise.",
        30: "A reader of a store that is being written is told how far it has come.",
        31: "Several trainers at once on one store get what each gets alone.",
    },
    "Data": {
        32: "NaN or infinity in an activation stops the harvest, and names layer, sequence and position.",
        33: "A value too large for the stored type is an error before it is written.",
        34: "Negative, constant and zero-variance batches have defined results.",
        35: "A loss that is not finite stops the training, publishes nothing, and names the batch.",
        36: "Widths that do not fit, k above d_sae and bad prefixes are refused with both numbers, before allocation.",
        37: "A missing model or tokenizer is one line: what, where it was looked for, how to supply it.",
        38: "An empty corpus publishes no store.",
        39: "Documents shorter or longer than the context: every token is accounted for.",
        40: "A missing text column is one line, with the columns there are; bad Unicode is replaced, and counted.",
        41: "A batch larger than the store, one row, a resume past the end: a clear error or a clean finish.",
        42: "A damaged row of a store, held out or trained on, that is not finite or longer than the statistics "
        "allow is an error naming shard and row, and never a figure. Shard files are read and compared with their "
        "checksums when a run opens its store: 256 MiB of held-out and of training blocks each, all with --verify.",
        43: "Lost rows of a run's logs are said by resume and by the report's verdict; a damaged row or record is "
        "named once and left out by watch, report, compare and resume.",
        44: "Samples have a checksum of every page, and a damaged file of them is refused.",
        45: "A store that was moved is given once with --store, and found by every later command of the run.",
    },
    "Records that belong together": {
        46: "A run whose store holds other rows, under whatever name, is not resumed, evaluated or compared on it: the "
        "block that differs is named.",
        47: "A run whose config.json says another thing than its checkpoints were trained with is refused by field; "
        "one that was made longer by `resume --steps` says so.",
        48: "A checkpoint whose state.json was edited does not verify.",
        49: "A run that is removed or renamed under its trainer ends in an error, and nothing is written in its place.",
    },
    "Text and tokens": {
        50: "Bytes that are no text are decoded where that is certain, or named with their file; replaced characters "
        "are counted and, if many, warned of.",
        51: "Padding of given token ids is never stored as text, with an attention mask or without.",
        52: "A row that is no document is named by file and row; it is left out only if asked for, and counted.",
        53: "A token that the model has no embedding of is one line before the model is loaded.",
        54: "Where documents are joined, EOS stands between them, also an EOS that is the BOS, unless asked otherwise.",
    },
    "Strangers' models and names": {
        55: "Names and texts of strangers reach a terminal as text: no markup, no control sequence.",
        56: "A model's rows are those of plain transformers, or the model is refused; odd folders are one line.",
    },
    "Diverged runs, renamed stores": {
        57: "A training that diverges (fvu above 10, where the mean alone leaves 1) says so when it does, ends with an "
        "error, and its report says so.",
        58: "A harvest takes up a store of the same content, whatever its folder, its model or its text are called; a "
        "model that is not where it was is asked for.",
    },
    "Rows from elsewhere": {
        59: "Files to import that are cut short, pickled, of other shapes or of other lengths than their pairs are "
        "refused before anything is written; a row that is not finite is named by file; an import that was cut off "
        "goes on and ends byte for byte the same; damage is repaired from the same files, and from no others.",
    },
    "Object storage, several processes, the hub": {
        60: "A harvest into object storage that is killed at any request, or whose requests fail or are answered with "
        "an error although they were done, leaves no record of what is not there; run again, it ends byte for byte as "
        "the local one. Two do not write one store; one that loses its lease commits nothing more.",
        61: "A training from object storage that is killed at any request and resumed has the weights of one from the "
        "local store; requests that fail are made again; a service that does not answer ends the run with exit code "
        "3; the local folder keeps its bound; damaged objects are named.",
        62: "Where processes share a training or a harvest and one is killed, the others end with an error and the "
        "last checkpoint or block, and any number of processes goes on from there to the same bytes.",
        63: "A push to the hub or a pull from it that is killed goes on; no damaged file is pushed, and none that came "
        "is taken for whole; a full disk ends a pull that can go on.",
        64: "Packing, unpacking and repairing in object storage, killed at any request, leave no record of what is not "
        "there; the same command ends byte for byte as on local folders. They refuse what another process writes, and "
        "stop when they lose their lease.",
    },
}
