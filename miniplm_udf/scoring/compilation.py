"""Compiles the layers of a decoder and the last step of the head with torch, while scoring goes on without compilation.

Input: a loaded decoder, or a function of tensors. Output: the same computation, eager at first and compiled as soon as
a thread in the background has compiled it. All layers of a class share the compiled code, so that the time does not
grow with their number; numbers of rows and tokens are dynamic. Compiled code is cached on disk and shared by all
processes of the node. If a function cannot be compiled, a warning says why and it stays eager. Executor side (and the
trainer's evaluation); a retry finds the cache.

Only one thread compiles at a time, and no compiled code runs meanwhile, because torch changes global state while it
traces: it says to all threads that it is compiling, and replaces `torch.nn.Module.__call__` (`_keep_traces_apart`). The
thread compiles and does not run the code. Triton times its kernels at their first run, which is therefore in the
scoring thread, with nothing else on the GPU.
"""

import atexit
import contextlib
import contextvars
import ctypes
import functools
import itertools
import logging
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from miniplm_udf.errors import first_line
from miniplm_udf.scoring.memory import is_out_of_memory

LOGGER = logging.getLogger("miniplm.scorer")

Backend = str | Callable[..., Any]
"""A backend of `torch.compile`: its name, or a function that compiles a graph for example inputs."""

# Variants of one function: kinds of layers with and without a mask, batches of one row. torch allows eight.
_MOST_VARIANTS = 8
# Python's own interval is 5 ms. Measured on two cores: small torch operations keep 33 % of their speed next to a thread
# of pure Python with 5 ms, and 48 % with 0.1 ms.
_SWITCH_SECONDS = 1e-4
# At exit the process waits this long for the compiling thread to stop.
_EXIT_SECONDS = 5.0
_NUMBERS = itertools.count()
# The thread that compiles, or that compiled last; None after `finish_compiling`.
_thread: threading.Thread | None = None


class _CompiledOnly(Exception):
    """Ends the call in the background before the compiled code runs."""


class _Unsuitable(Exception):
    """Torch could compile the function, but the code would be of no use."""


def finish_compiling() -> bool:
    """Waits until nothing is compiled any more.

    Returns:
        Whether a compilation has begun since the last call. Score a batch again in this case: it may have layers of
        another kind, whose compilation begins then.
    """
    global _thread
    thread = _thread
    if thread is not None:
        thread.join()
    _thread = None
    return thread is not None


class CompiledFunction:
    """A function of tensors that is compiled in the background when it is first called, and eager until then.

    Torch checks at each call whether compiled code fits the arguments. Where none does, the call is eager and another
    variant is compiled.

    Attributes:
        enabled: whether calls may use or begin a compilation; otherwise they are eager.

    Args:
        function: a plain Python function without side effects.
        name: what it is, for the log.
        backend: compiler of torch; "inductor" except in tests.
    """

    def __init__(self, function: Callable[..., Any], name: str, backend: Backend = "inductor") -> None:
        self.enabled = True
        self._eager, self._name, self._inner_backend = function, name, backend
        self._compiled: Callable[..., Any] | None = None
        self._variants, self._runs = 0, 0
        # The compiled code of each graph.
        self._codes: list[Callable[..., Any]] = []
        self._has_failed = self._is_final = False
        # Sizes of the first tensor argument of the call that is being compiled.
        self._sample_shape: tuple[int, ...] = ()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Calls the function.

        Args:
            *arguments: as the function takes them.
            **named: as the function takes them.

        Returns:
            The function's result, equal up to rounding whether compiled or not.
        """
        if not self.enabled or self._has_failed or _is_compiling():
            return self._eager(*arguments, **named)
        if self._compiled is None:
            self._begin(arguments, named)
            return self._eager(*arguments, **named)
        runs = self._runs
        try:
            with torch.compiler.set_stance("eager_on_recompile"):
                result = self._compiled(*arguments, **named)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self._has_failed = True
            _warn(self._name, error)
            return self._eager(*arguments, **named)
        if self._runs == runs:  # no variant fits: torch has run the function itself
            self._begin(arguments, named)
        return result

    def _begin(self, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """Begins to compile the function for arguments like these."""
        global _thread
        if self._is_final:
            return
        if self._variants == _MOST_VARIANTS:
            self._is_final = True
            LOGGER.warning(
                "%s: %d variants are compiled; what fits none runs without compilation, which is slower",
                self._name, self._variants,
            )  # fmt: skip
            return
        sample = _aliases((arguments, named))
        modes = (torch.is_inference_mode_enabled(), torch.is_grad_enabled())
        # A thread begins with a context of its own, and torch keeps its settings there.
        context = contextvars.copy_context()
        _thread = threading.Thread(
            target=context.run, args=(self._compile, sample, *modes), name="compile", daemon=True
        )
        _thread.start()

    def _compile(self, sample: tuple[Any, Any], is_inference: bool, has_grad: bool) -> None:
        """Compiles one variant. Runs in the background."""
        start, interval = time.monotonic(), sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_SECONDS)
        try:
            _stop_at_exit()
            _keep_traces_apart()
            if self._compiled is None:
                self._compiled = torch.compile(_own_copy(self._eager), backend=_backend_of(self), fullgraph=True)
            arguments, named = tree_map(_with_dynamic_sizes, sample)
            tensors = (value for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor))
            first = next(tensors, torch.empty(0))
            self._sample_shape = tuple(first.shape)
            if first.device.type == "cuda":
                # A new thread has no CUDA context, which the compiler needs. `set_device` alone returns at once where
                # the device is the first one.
                torch.cuda.set_device(first.device)
                torch.zeros(1, device=first.device)
            with torch.inference_mode(is_inference), torch.set_grad_enabled(has_grad):
                self._compiled(*arguments, **named)
            raise _Unsuitable("torch skips it")
        except _CompiledOnly:
            self._variants += 1
            LOGGER.info("%s: compiled in %.1f s", self._name, time.monotonic() - start)
        except Exception as error:
            if threading.main_thread().is_alive():  # otherwise the process ends, and torch cannot start threads
                self._is_final = True
                self._has_failed = self._variants == 0
                _warn(self._name, error)
        finally:
            sys.setswitchinterval(interval)

    def _compiled_graph(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compiles a graph as torch's own backend does; the result counts its runs, and none is in the background."""
        from torch._dynamo.backends.registry import lookup_backend

        _check_sizes(graph, self._sample_shape)
        backend = self._inner_backend
        number = len(self._codes)
        self._codes.append((lookup_backend(backend) if isinstance(backend, str) else backend)(graph, inputs))
        reference = weakref.ref(self)

        def counted_run(*arguments: Any) -> Any:
            if threading.current_thread() is _thread:
                raise _CompiledOnly
            function = reference()
            assert function is not None, "its caller holds it"
            function._runs += 1
            return function._codes[number](*arguments)

        return counted_run


def _backend_of(function: CompiledFunction) -> Backend:
    """The backend of a function. Both it and its results hold no reference: torch keeps them until the process ends."""
    reference = weakref.ref(function)

    def compile_graph(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        owner = reference()
        assert owner is not None, "the thread that compiles holds it"
        return owner._compiled_graph(graph, inputs)

    return compile_graph


class _LayerForward:
    """The `forward` of one layer. Holds no reference to the layer, whose memory would not be freed at once then."""

    def __init__(self, function: CompiledFunction, layer: torch.nn.Module) -> None:
        self.function, self._layer = function, weakref.ref(layer)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.function(self._layer(), *arguments, **named)


class CompiledLayers:
    """The layers of a decoder, whose `forward` is a `CompiledFunction`, one for each class of layers.

    Outside of `active` they are eager, so that other users of the model see no change.

    Args:
        decoder: a decoder of transformers; the `forward` of its layers is replaced.
        backend: compiler of torch; "inductor" except in tests.
    """

    def __init__(self, decoder: torch.nn.Module, backend: Backend = "inductor") -> None:
        by_class: dict[type, CompiledFunction] = {}
        layers = _layers(decoder)
        for layer in layers:
            kind = type(layer)
            own = vars(layer).get("forward")
            if isinstance(own, _LayerForward):
                by_class[kind] = own.function  # another scorer of this model has prepared its layers
                continue
            if own is not None or not isinstance(kind.forward, types.FunctionType):
                continue  # another library has replaced the layer's `forward`
            if kind not in by_class:
                by_class[kind] = CompiledFunction(kind.forward, kind.__name__, backend)
            layer.forward = _LayerForward(by_class[kind], layer)
        self._functions = list(by_class.values())
        for function in self._functions:
            function.enabled = False
        if not self._functions:
            reason = (
                "another library has replaced the `forward` of its layers" if layers else "it has no list of layers"
            )
            LOGGER.warning("%s: runs without compilation, which is slower: %s", type(decoder).__name__, reason)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Lets the layers compile and use compiled code while the block runs."""
        for function in self._functions:
            function.enabled = True
        try:
            yield
        finally:
            for function in self._functions:
                function.enabled = False


def _layers(decoder: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers of a decoder: the elements of its largest list of modules, by parameters."""
    lists = [module for module in decoder.modules() if isinstance(module, torch.nn.ModuleList) and len(module) > 0]
    sizes = [sum(weight.numel() for weight in (*modules.parameters(), *modules.buffers())) for modules in lists]
    return list(max(zip(sizes, lists, strict=True), key=lambda pair: pair[0])[1]) if lists else []


def _is_compiling() -> bool:
    return _thread is not None and _thread.is_alive()


def _keep_traces_apart() -> None:
    """Makes torch's symbolic tracer replace methods of `torch.nn.Module` for its own thread only.

    Otherwise a module that another thread calls meanwhile becomes a part of the trace, and the call fails.
    """
    patcher = torch.fx._symbolic_trace._Patcher
    replace = patcher.patch_method
    if getattr(replace, "is_of_one_thread", False):
        return

    def patch_method(self: Any, cls: type, name: str, function: Callable[..., Any], deduplicate: bool = True) -> None:
        tracing, before = threading.get_ident(), getattr(cls, name)

        @functools.wraps(function)
        def for_one_thread(*arguments: Any, **named: Any) -> Any:
            return (function if threading.get_ident() == tracing else before)(*arguments, **named)

        replace(self, cls, name, for_one_thread, deduplicate)

    patch_method.is_of_one_thread = True  # type: ignore[attr-defined]
    patcher.patch_method = patch_method


def _stop_at_exit() -> None:
    """Makes the process end the compiling thread when it exits, before torch ends its own compiling processes."""
    # Python calls the function that was registered last first, so torch's has to be registered before.
    import torch._inductor.async_compile  # noqa: F401

    atexit.unregister(_stop_compiling)
    atexit.register(_stop_compiling)


def _stop_compiling() -> None:
    thread = _thread
    if thread is not None and thread.is_alive():
        # Raised at the thread's next Python instruction; threading reports no SystemExit.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        thread.join(_EXIT_SECONDS)


def _own_copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy with a code object of its own, because torch keeps compiled variants, and limits them, by code object."""
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=f"{function.__code__.co_name}_{next(_NUMBERS)}")
    copy = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _aliases(values: Any) -> Any:
    """The values with new tensors over the same memory, so that marks on these do not show on the model's own."""
    made: dict[int, torch.Tensor] = {}

    def alias(value: Any) -> Any:
        # The same tensor twice stays the same tensor twice: torch checks this too.
        return made.setdefault(id(value), value.detach()) if isinstance(value, torch.Tensor) else value

    return tree_map(alias, values)


def _with_dynamic_sizes(value: Any) -> Any:
    """Lets torch treat all sizes of a tensor as dynamic. It fixes sizes of 1, and those that the weights determine."""
    if isinstance(value, torch.Tensor):
        torch._dynamo.maybe_mark_dynamic(value, [index for index, size in enumerate(value.shape) if size > 1])
    return value


def _warn(name: str, error: Exception) -> None:
    error = getattr(error, "inner_exception", error)  # torch wraps the errors of a backend
    LOGGER.warning(
        "%s: runs without compilation, which is slower: %s: %s", name, type(error).__name__, first_line(error)
    )


def _check_sizes(graph: torch.fx.GraphModule, shape: tuple[int, ...]) -> None:
    """Refuses a graph that is valid for one number of rows or tokens only, such as an unrolled loop over the tokens.

    Args:
        graph: a graph of torch, whose inputs have symbolic sizes.
        shape: sizes of the function's first tensor argument.

    Raises:
        _Unsuitable: the first or the second size is fixed in the graph although it is larger than 1.
    """
    inputs = [node.meta.get("example_value") for node in graph.graph.nodes if node.op == "placeholder"]
    shapes = [value.shape for value in inputs if isinstance(value, torch.Tensor) and _hints(value.shape) == shape]
    if shapes and not any(all(n == 1 or _is_dynamic(n) for n in sizes[:2]) for sizes in shapes):
        raise _Unsuitable("its code depends on the number of rows or tokens, so each number would need code of its own")


def _hints(sizes: Sequence[Any]) -> tuple[int, ...]:
    """The sizes that symbolic sizes have in the sample."""
    return tuple(size.node.hint if isinstance(size, torch.SymInt) else size for size in sizes)


def _is_dynamic(size: Any) -> bool:
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number
