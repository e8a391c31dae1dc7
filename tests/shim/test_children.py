"""Spawned processes: they see flash_attn where their parent does, also if no start-up file runs."""

from .environments import ROOT, make_venv, write

PROGRAM = """
    import multiprocessing

    def call(function, x):
        return type(x).__name__, function.__module__, tuple(function(x, x, x).shape)

    def main():
        import flash_attn_shim
        flash_attn_shim.install()
        import torch
        from flash_attn import flash_attn_func
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(pool.apply_async(call, (flash_attn_func, torch.ones(1, 3, 2, 8))).get(60))

    if __name__ == "__main__":
        main()
    """


def test_a_pool_of_spawned_processes(tmp_path):
    """As after `pip install --target`, with `install()` where a spawned process does not come by."""
    interpreter = make_venv(tmp_path / "venv", outer=True)
    write(tmp_path, {"program.py": PROGRAM})
    done = interpreter.start(tmp_path / "program.py", PYTHONPATH=ROOT, MTLFLASHATTN_SHIM="on")
    assert done.stdout.strip() == "('Tensor', 'flash_attn.flash_attn_interface', (1, 3, 2, 8))", done.stderr


def test_the_command_is_changed_only_by_an_explicit_install(installed):
    program = """
    from multiprocessing import spawn
    import flash_attn_shim
    before = spawn.get_command_line
    flash_attn_shim.install()
    assert spawn.get_command_line is before  # the start-up file set the hook, in the children too
    flash_attn_shim.uninstall()
    flash_attn_shim.install()
    command = spawn.get_command_line(pipe_handle=3)
    assert any("install(); from multiprocessing.spawn import spawn_main" in str(part) for part in command)
    flash_attn_shim.uninstall()
    assert spawn.get_command_line is before
    """
    assert installed.run(program, MTLFLASHATTN_SHIM="on") == ""


def test_missing_files_are_named(installed):
    program = """
    import flash_attn_shim, flash_attn_shim.finder as finder, flash_attn_shim.files as files
    for owner, name in ((finder, "PRESENTS"), (files, "_KERNEL")):
        before = getattr(owner, name)
        setattr(owner, name, "nowhere/" + name)
        try:
            flash_attn_shim.install()
        except ImportError as error:
            print(error)
        setattr(owner, name, before)
    flash_attn_shim.install()
    """
    said = installed.run(program, MTLFLASHATTN_SHIM="on").splitlines()
    assert "missing: nowhere/PRESENTS/flash_attn, nowhere/PRESENTS/flash_attn_interface. If this is a frozen" in said[0]
    assert "missing: " in said[1]
    assert "nowhere/_KERNEL. If this is a frozen program: PyInstaller" in said[1]
