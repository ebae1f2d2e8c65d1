/* Who reads a saved tensor, as `offload.reader` tells it: asked for each tensor that may be lent. */

#include "_fast.h"

typedef struct {
    PyObject_HEAD
    PyObject *current_node, *is_grad_enabled, *num_modes;
    PyObject *nodes;        /* types of nodes that only read */
    PyObject *running_code; /* of the function that runs backward */
    PyObject *package;      /* how the names of this package's files begin */
} Reader;

static int reader_traverse(Reader *self, visitproc visit, void *arg)
{
    Py_VISIT(self->current_node);
    Py_VISIT(self->is_grad_enabled);
    Py_VISIT(self->num_modes);
    Py_VISIT(self->nodes);
    Py_VISIT(self->running_code);
    Py_VISIT(self->package);
    return 0;
}

static int reader_clear(Reader *self)
{
    Py_CLEAR(self->current_node);
    Py_CLEAR(self->is_grad_enabled);
    Py_CLEAR(self->num_modes);
    Py_CLEAR(self->nodes);
    Py_CLEAR(self->running_code);
    Py_CLEAR(self->package);
    return 0;
}

static void reader_dealloc(Reader *self)
{
    PyObject_GC_UnTrack(self);
    reader_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static int reader_init(Reader *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"current_node", "is_grad_enabled", "num_modes", "nodes", "running_code",
                            "package", NULL};
    PyObject *current_node, *is_grad_enabled, *num_modes, *nodes, *running_code, *package;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$OOOO!OU", names, &current_node, &is_grad_enabled,
                                     &num_modes, &PyFrozenSet_Type, &nodes, &running_code, &package))
        return -1;
    reader_clear(self);
    self->current_node = Py_NewRef(current_node);
    self->is_grad_enabled = Py_NewRef(is_grad_enabled);
    self->num_modes = Py_NewRef(num_modes);
    self->nodes = Py_NewRef(nodes);
    self->running_code = Py_NewRef(running_code);
    self->package = Py_NewRef(package);
    return 0;
}

/* Whether a node that only reads runs, and makes no graph of its own; -1 and an error. */
static int is_known_node(Reader *self)
{
    PyObject *is_enabled = PyObject_CallNoArgs(self->is_grad_enabled);
    Py_XDECREF(is_enabled); /* a bool: it lives on */
    if (is_enabled != Py_False)
        return is_enabled == NULL ? -1 : 0;
    PyObject *num_modes = PyObject_CallNoArgs(self->num_modes); /* a mode gets what a node hands to its operators */
    Py_ssize_t num = num_modes == NULL ? -1 : PyLong_AsSsize_t(num_modes);
    Py_XDECREF(num_modes);
    if (num != 0)
        return num < 0 ? -1 : 0;
    PyObject *node = PyObject_CallNoArgs(self->current_node);
    int is_known = node == NULL ? -1 : PySet_Contains(self->nodes, (PyObject *)Py_TYPE(node));
    Py_XDECREF(node);
    return is_known;
}

/* Whether nothing but this package stands between the engine and the caller; -1 and an error. */
static int is_called_by_engine(Reader *self)
{
    PyFrameObject *frame = (PyFrameObject *)Py_XNewRef((PyObject *)PyEval_GetFrame());
    int is_so = 0;
    while (frame != NULL) {
        PyCodeObject *code = PyFrame_GetCode(frame);
        Py_ssize_t is_ours = PyUnicode_Tailmatch(code->co_filename, self->package, 0, PY_SSIZE_T_MAX, -1);
        PyFrameObject *back = is_ours > 0 ? PyFrame_GetBack(frame) : NULL;
        is_so = is_ours < 0 ? -1 : is_ours || (PyObject *)code == self->running_code;
        Py_DECREF(code);
        Py_DECREF(frame);
        frame = back;
    }
    return is_so;
}

static PyObject *reader_call(Reader *self, PyObject *args, PyObject *kwargs)
{
    int is_so = is_known_node(self);
    if (is_so > 0)
        is_so = is_called_by_engine(self);
    return is_so < 0 ? NULL : PyBool_FromLong(is_so);
}

PyTypeObject ReaderType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "offload._fast.Reader",
    .tp_doc = "Tells whether a tensor that is being unpacked goes to nobody but a node that only reads it.",
    .tp_basicsize = sizeof(Reader),
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)reader_init,
    .tp_call = (ternaryfunc)reader_call,
    .tp_dealloc = (destructor)reader_dealloc,
    .tp_traverse = (traverseproc)reader_traverse,
    .tp_clear = (inquiry)reader_clear,
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
};
