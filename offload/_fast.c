/* The short way of a save: what is kept by reference without a look at its bytes, as nearly all saves of nearly
 * all steps are. `SavedTensorStore._pack` is the whole way and comes to the same; what cannot be decided here at
 * once goes there, and where this file was not compiled, everything does.
 *
 * Between two operators the caches are theirs, and the same steps in Python take three times as long.
 */

#include "_fast.h"

static PyObject *name_base, *name_version, *name_data_ptr, *name_detach, *name_dtype, *name_is_contiguous,
    *name_is_late, *name_is_nested, *name_is_quantized, *name_is_reference, *name_nbytes, *name_num_to_skip,
    *name_open, *name_shape, *name_untyped_storage;

/* Whether a flag is set; -1 and an error where it cannot be had. */
static int is_true(PyObject *owner, PyObject *name)
{
    PyObject *flag = PyObject_GetAttr(owner, name);
    Py_XDECREF(flag);
    return flag == NULL ? -1 : flag == Py_True;
}

/* ---- Kept: offload.handle.Kept ---- */

typedef struct {
    PyObject_HEAD
    PyObject *alias;      /* NULL once a handle has the save */
    PyObject *handle;
    Claim *claim;         /* NULL for a parameter, and once a handle has the save */
    PyObject *log_append; /* of the ledger's log, not of the store: a graph does not keep its store alive */
    Py_ssize_t version, num_bytes;
    int is_late; /* whether a handle may come to have it */
    PyObject *weakrefs;
} Kept;

static void kept_dealloc(Kept *self)
{
    PyObject *kind, *error, *trace;
    PyErr_Fetch(&kind, &error, &trace); /* a graph may end while an error is on its way */
    if (self->weakrefs != NULL)
        PyObject_ClearWeakRefs((PyObject *)self);
    if (self->claim != NULL) {
        /* Before the alias goes: its storage's identity may come back with another one. */
        PyObject *none = PyObject_CallOneArg(self->log_append, (PyObject *)self->claim);
        if (none == NULL)
            PyErr_WriteUnraisable(self->log_append); /* `self` has no references left to lend */
        Py_XDECREF(none);
        Py_DECREF(self->claim);
    }
    Py_XDECREF(self->log_append);
    Py_XDECREF(self->handle);
    Py_XDECREF(self->alias);
    PyObject_Free(self);
    PyErr_Restore(kind, error, trace);
}

/* Raise the error of offload.handle.require_fresh; 0 where it finds nothing wrong. */
static int refuse(Kept *self, PyObject *alias)
{
    PyObject *handle = PyImport_ImportModule("offload.handle");
    PyObject *require_fresh = handle == NULL ? NULL : PyObject_GetAttrString(handle, "require_fresh");
    PyObject *alone = Py_BuildValue("(O)", alias);
    PyObject *named = Py_BuildValue("{s:n,s:n}", "version", self->version, "num_bytes", self->num_bytes);
    PyObject *none = NULL;
    if (require_fresh != NULL && alone != NULL && named != NULL)
        none = PyObject_Call(require_fresh, alone, named);
    Py_XDECREF(named);
    Py_XDECREF(alone);
    Py_XDECREF(require_fresh);
    Py_XDECREF(handle);
    Py_XDECREF(none);
    return none == NULL ? -1 : 0;
}

/* Return the saved tensor, or the error that it is no longer what was saved. */
static PyObject *open_alias(Kept *self, PyObject *alias)
{
    Py_ssize_t version = number_of(alias, name_version, 0);
    if (version < 0 && PyErr_Occurred())
        return NULL;
    int is_fresh = version == self->version;
    if (is_fresh && self->num_bytes) {
        PyObject *storage = PyObject_CallMethodNoArgs(alias, name_untyped_storage);
        if (storage == NULL)
            return NULL;
        Py_ssize_t num_bytes = number_of(storage, name_nbytes, 1);
        Py_DECREF(storage);
        if (num_bytes < 0)
            return NULL;
        is_fresh = num_bytes >= self->num_bytes;
    }
    if (!is_fresh && refuse(self, alias) < 0)
        return NULL;
    /* Of the reader's own where the save may be settled meanwhile, by whoever counts who has the storage. */
    return self->is_late ? PyObject_CallMethodNoArgs(alias, name_detach) : Py_NewRef(alias);
}

static PyObject *kept_open(Kept *self, PyObject *unused)
{
    if (self->handle != NULL)
        return PyObject_CallMethodNoArgs(self->handle, name_open);
    PyObject *alias = Py_NewRef(self->alias);
    PyObject *opened = open_alias(self, alias);
    Py_DECREF(alias);
    if (opened == NULL || self->handle == NULL)
        return opened;
    /* Another thread settled the save before it could count this reader. */
    Py_DECREF(opened);
    return PyObject_CallMethodNoArgs(self->handle, name_open);
}

static PyObject *kept_open_own(Kept *self, PyObject *unused)
{
    return self->handle == NULL ? kept_open(self, NULL) : PyObject_CallMethod(self->handle, "open_own", NULL);
}

static PyObject *kept_hold(Kept *self, PyObject *handle)
{
    if (self->handle != NULL) {
        PyErr_SetString(PyExc_RuntimeError, "Kept.hold: another handle has the save already");
        return NULL;
    }
    self->handle = Py_NewRef(handle);
    Py_CLEAR(self->claim);
    Py_CLEAR(self->alias);
    Py_RETURN_NONE;
}

static PyObject *kept_is_reference(Kept *self, void *unused)
{
    return self->handle == NULL ? Py_NewRef(Py_True) : PyObject_GetAttr(self->handle, name_is_reference);
}

static PyMethodDef kept_methods[] = {
    {"open", (PyCFunction)kept_open, METH_NOARGS,
     "Return the saved tensor; raises StaleTensorError when it is no longer what was saved."},
    {"open_own", (PyCFunction)kept_open_own, METH_NOARGS,
     "Return it as it was saved also where the storage that others have was written blindly."},
    {"hold", (PyCFunction)kept_hold, METH_O, "Leave a late save to a handle."},
    {NULL},
};

static PyMemberDef kept_members[] = {
    {"alias", T_OBJECT, offsetof(Kept, alias), READONLY, "the saved tensor, None once a handle has it"},
    {"claim", T_OBJECT, offsetof(Kept, claim), READONLY, "what it holds"},
    {"version", T_PYSSIZET, offsetof(Kept, version), READONLY, "of the tensor when it was saved"},
    {NULL},
};

static PyGetSetDef kept_getset[] = {
    {"is_reference", (getter)kept_is_reference, NULL, "whether the bytes are still the tensor's"},
    {NULL},
};

static PyTypeObject KeptType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "offload._fast.Kept",
    .tp_doc = "What autograd keeps for a save by reference; its end is noted in the ledger's log.",
    .tp_basicsize = sizeof(Kept),
    .tp_dealloc = (destructor)kept_dealloc,
    .tp_methods = kept_methods,
    .tp_members = kept_members,
    .tp_getset = kept_getset,
    .tp_weaklistoffset = offsetof(Kept, weakrefs),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
};

/* ---- Packer: one store's short way ---- */

typedef struct {
    PyObject_HEAD
    PyObject *pack_whole;        /* the whole way */
    PyTypeObject *tensor, *parameter;
    PyObject *ours;              /* {file name: whether its frames are passed over}, of Sites */
    PyObject *seen;              /* {(instruction, shape, dtype, is dense): (row, line, reading, is offered)} */
    PyObject *records;           /* {identity: record} of the storages that were read, of StorageIndex */
    PyObject *log, *log_append;  /* of the ledger */
    PyObject *offers_append;     /* of the offers that wait */
    PyObject *arrivals_append;   /* of the queue of saves that wait */
    PyTypeObject *late;          /* of those */
    PyObject *sequence_nr;       /* the number of the node that is made next */
    Py_ssize_t min_bytes, least_bytes, most_lines;
    Py_ssize_t room_bytes;       /* what may yet wait; negative once the whole way has more to do than its save */
} Packer;

static int packer_traverse(Packer *self, visitproc visit, void *arg)
{
    Py_VISIT(self->pack_whole);
    Py_VISIT(self->tensor);
    Py_VISIT(self->parameter);
    Py_VISIT(self->ours);
    Py_VISIT(self->seen);
    Py_VISIT(self->records);
    Py_VISIT(self->log);
    Py_VISIT(self->log_append);
    Py_VISIT(self->offers_append);
    Py_VISIT(self->arrivals_append);
    Py_VISIT(self->late);
    Py_VISIT(self->sequence_nr);
    return 0;
}

static int packer_clear(Packer *self)
{
    Py_CLEAR(self->pack_whole);
    Py_CLEAR(self->tensor);
    Py_CLEAR(self->parameter);
    Py_CLEAR(self->ours);
    Py_CLEAR(self->seen);
    Py_CLEAR(self->records);
    Py_CLEAR(self->log);
    Py_CLEAR(self->log_append);
    Py_CLEAR(self->offers_append);
    Py_CLEAR(self->arrivals_append);
    Py_CLEAR(self->late);
    Py_CLEAR(self->sequence_nr);
    return 0;
}

static void packer_dealloc(Packer *self)
{
    PyObject_GC_UnTrack(self);
    packer_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static int packer_init(Packer *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"pack_whole", "tensor", "parameter", "ours", "seen", "records", "log", "offers_append",
                            "arrivals", "late", "sequence_nr", "min_bytes", "least_bytes", "most_lines", NULL};
    PyObject *whole, *tensor, *parameter, *ours, *seen, *records, *log, *offers, *arrivals, *late, *sequence_nr;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$OO!O!O!O!O!OOOO!Onnn", names, &whole, &PyType_Type, &tensor,
                                     &PyType_Type, &parameter, &PyDict_Type, &ours, &PyDict_Type, &seen,
                                     &PyDict_Type, &records, &log, &offers, &arrivals, &PyType_Type, &late,
                                     &sequence_nr, &self->min_bytes, &self->least_bytes, &self->most_lines))
        return -1;
    packer_clear(self);
    self->log_append = PyObject_GetAttrString(log, "append");
    self->arrivals_append = PyObject_GetAttrString(arrivals, "append");
    if (self->log_append == NULL || self->arrivals_append == NULL)
        return -1;
    self->pack_whole = Py_NewRef(whole);
    self->tensor = (PyTypeObject *)Py_NewRef(tensor);
    self->parameter = (PyTypeObject *)Py_NewRef(parameter);
    self->ours = Py_NewRef(ours);
    self->seen = Py_NewRef(seen);
    self->records = Py_NewRef(records);
    self->log = Py_NewRef(log);
    self->offers_append = Py_NewRef(offers);
    self->late = (PyTypeObject *)Py_NewRef(late);
    self->sequence_nr = Py_NewRef(sequence_nr);
    return 0;
}

/* Whether `tensor` is a parameter or a view of one; -1 where that is for the whole way to say. */
static int is_parameter(Packer *self, PyObject *tensor)
{
    PyTypeObject *kind = Py_TYPE(tensor);
    if (kind == self->tensor) {
        PyObject *base = PyObject_GetAttr(tensor, name_base);
        if (base == NULL)
            return -1;
        if (base != Py_None)
            kind = Py_TYPE(base);
        Py_DECREF(base);
    }
    return kind == self->parameter ? 1 : kind == self->tensor ? 0 : -1;
}

/* The key of the instruction that is saving, as Sites.calling makes it; NULL where a file is new to it. */
static PyObject *calling(Packer *self)
{
    PyFrameObject *frame = (PyFrameObject *)Py_XNewRef((PyObject *)PyEval_GetFrame());
    PyObject *key = NULL;
    while (frame != NULL) {
        PyCodeObject *code = PyFrame_GetCode(frame);
        PyObject *is_passed = PyDict_GetItemWithError(self->ours, code->co_filename);
        PyFrameObject *back = is_passed == Py_True ? PyFrame_GetBack(frame) : NULL;
        if (is_passed != NULL && back == NULL)
            key = Py_BuildValue("(Ni)", PyLong_FromVoidPtr(code), PyFrame_GetLasti(frame));
        Py_DECREF(code);
        Py_DECREF(frame);
        frame = back;
    }
    return key;
}

/* What is known of such saves, a new reference; NULL where nothing is. */
static PyObject *find_seen(Packer *self, PyObject *tensor, int is_param)
{
    PyObject *site = calling(self);
    if (site == NULL)
        return NULL;
    PyObject *dense = is_param ? Py_NewRef(Py_False) : PyObject_CallMethodNoArgs(tensor, name_is_contiguous);
    PyObject *key = Py_BuildValue("(NNNN)", site, PyObject_GetAttr(tensor, name_shape),
                                  PyObject_GetAttr(tensor, name_dtype), dense);
    PyObject *found = key == NULL ? NULL : Py_XNewRef(PyDict_GetItemWithError(self->seen, key));
    Py_XDECREF(key);
    return found;
}

/* Return a save by reference, `claim` (stolen) what it holds; NULL with an error set. */
static PyObject *new_kept(Packer *self, PyObject *tensor, Claim *claim)
{
    PyObject *alias = PyObject_CallMethodNoArgs(tensor, name_detach);
    Py_ssize_t version = alias == NULL ? -1 : number_of(alias, name_version, 0);
    Kept *kept = version < 0 ? NULL : PyObject_New(Kept, &KeptType);
    if (kept == NULL) {
        Py_XDECREF(alias);
        Py_XDECREF(claim);
        return NULL;
    }
    kept->alias = alias;
    kept->handle = NULL;
    kept->claim = claim;
    kept->is_late = claim != NULL && claim->row == NULL;
    kept->log_append = Py_NewRef(self->log_append);
    kept->version = version;
    kept->num_bytes = claim == NULL ? 0 : claim->num_bytes;
    kept->weakrefs = NULL;
    return (PyObject *)kept;
}

/* Call a function of one argument, stolen, for what it does; 0, or -1 and an error. */
static int tell(PyObject *function, PyObject *told)
{
    PyObject *none = told == NULL ? NULL : PyObject_CallOneArg(function, told);
    Py_XDECREF(told);
    Py_XDECREF(none);
    return none == NULL ? -1 : 0;
}

/* Let a late save wait until its operator has returned, as Queue.put does; 0, or -1 and an error. */
static int wait(Packer *self, Kept *kept, PyObject *seen)
{
    PyObject *fields = Py_BuildValue("((NNOOOn))", PyObject_CallNoArgs(self->sequence_nr),
                                     PyWeakref_NewRef((PyObject *)kept, NULL), PyTuple_GET_ITEM(seen, 0),
                                     PyTuple_GET_ITEM(seen, 1), kept->claim, kept->num_bytes);
    PyObject *late = fields == NULL ? NULL : PyTuple_Type.tp_new(self->late, fields, NULL);
    Py_XDECREF(fields);
    if (late == NULL)
        return -1;
    Py_ssize_t num_bytes = kept->num_bytes > self->least_bytes ? kept->num_bytes : self->least_bytes;
    self->room_bytes -= num_bytes;
    return tell(self->arrivals_append, Py_BuildValue("(knN)", PyThread_get_thread_ident(), num_bytes, late));
}

/* Tell the ledger of a save, and who may ask for it later; 0, or -1 and an error. */
static int note(Packer *self, Kept *kept, PyObject *seen)
{
    PyObject *row = PyTuple_GET_ITEM(seen, 0);
    if (tell(self->log_append, kept->claim == NULL ? Py_NewRef(row) : PyTuple_Pack(1, kept->claim)) < 0)
        return -1;
    if (kept->is_late)
        return wait(self, kept, seen);
    if (PyTuple_GET_ITEM(seen, 3) != Py_True)
        return 0;
    PyObject *find = PyWeakref_NewRef((PyObject *)kept, NULL);
    return tell(self->offers_append, Py_BuildValue("(Nn)", find, kept->num_bytes));
}

enum look { WHOLE_WAY, NEVER, LATE };

/* Return when the bytes of `storage` are looked at, as Settler.admit decides it; takes note of a save that is
 * passed over. */
static enum look when_read(Packer *self, PyObject *storage, Py_ssize_t num_bytes, PyObject *seen)
{
    PyObject *line = PyTuple_GET_ITEM(seen, 1), *reading = PyTuple_GET_ITEM(seen, 2);
    if (num_bytes < self->min_bytes)
        return NEVER;
    PyObject *key = PyLong_FromVoidPtr(storage);
    int is_known = key == NULL ? -1 : PyDict_Contains(self->records, key);
    Py_XDECREF(key);
    Py_ssize_t num_to_skip = is_known ? -1 : number_of(reading, name_num_to_skip, 0);
    if (num_to_skip == 0)
        return is_true(line, name_is_late) > 0 ? LATE : WHOLE_WAY;
    if (num_to_skip < 0)
        return WHOLE_WAY;
    PyObject *fewer = PyLong_FromSsize_t(num_to_skip - 1);
    int is_set = fewer != NULL && PyObject_SetAttr(reading, name_num_to_skip, fewer) == 0;
    Py_XDECREF(fewer);
    return is_set ? NEVER : WHOLE_WAY;
}

/* Return the claim to the storage of a plain tensor; NULL, with or without an error, for the whole way. */
static Claim *claim_storage(Packer *self, PyObject *tensor, PyObject *seen)
{
    PyObject *storage = PyObject_CallMethodNoArgs(tensor, name_untyped_storage);
    if (storage == NULL)
        return NULL; /* a sparse one, for example, shows none */
    Claim *claim = NULL;
    if (number_of(storage, name_data_ptr, 1) > 0) {
        Py_ssize_t num_bytes = number_of(storage, name_nbytes, 1);
        enum look look = num_bytes < 0 ? WHOLE_WAY : when_read(self, storage, num_bytes, seen);
        if (look != WHOLE_WAY)
            claim = PyObject_New(Claim, &ClaimType);
        if (claim != NULL) {
            claim->key = (Py_ssize_t)storage;
            claim->num_bytes = num_bytes;
            claim->added_bytes = 0;
            claim->row = look == LATE ? NULL : Py_NewRef(PyTuple_GET_ITEM(seen, 0)); /* counted later */
            claim->is_booked = 0;
        }
    }
    Py_DECREF(storage);
    return claim;
}

/* Keep `tensor` by reference; NULL, with or without an error, for the whole way. */
static PyObject *keep(Packer *self, PyObject *tensor)
{
    int is_param = is_parameter(self, tensor);
    if (is_param < 0 || is_true(tensor, name_is_quantized) || is_true(tensor, name_is_nested))
        return NULL;
    PyObject *seen = find_seen(self, tensor, is_param), *kept = NULL;
    if (seen == NULL)
        return NULL;
    Claim *claim = is_param ? NULL : claim_storage(self, tensor, seen);
    if (is_param || claim != NULL)
        kept = new_kept(self, tensor, claim);
    if (kept != NULL && note(self, (Kept *)kept, seen) < 0)
        Py_CLEAR(kept);
    Py_DECREF(seen);
    return kept;
}

static PyObject *packer_pack(Packer *self, PyObject *tensor)
{
    Py_ssize_t num_lines = PyObject_Size(self->log);
    if (self->room_bytes >= 0 && 0 <= num_lines && num_lines < self->most_lines) {
        PyObject *kept = keep(self, tensor);
        if (kept != NULL)
            return kept;
    }
    if (PyErr_Occurred()) {
        if (!PyErr_ExceptionMatches(PyExc_Exception))
            return NULL; /* an interrupt */
        PyErr_Clear(); /* the whole way asks again */
    }
    return PyObject_CallOneArg(self->pack_whole, tensor);
}

static PyMethodDef packer_methods[] = {
    {"pack", (PyCFunction)packer_pack, METH_O, "Pack a tensor that autograd saves."},
    {NULL},
};

static PyMemberDef packer_members[] = {
    {"room_bytes", T_PYSSIZET, offsetof(Packer, room_bytes), 0, "what may yet wait before the whole way is due"},
    {NULL},
};

static PyTypeObject PackerType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "offload._fast.Packer",
    .tp_doc = "The short way of a store's saves.",
    .tp_basicsize = sizeof(Packer),
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)packer_init,
    .tp_dealloc = (destructor)packer_dealloc,
    .tp_traverse = (traverseproc)packer_traverse,
    .tp_clear = (inquiry)packer_clear,
    .tp_methods = packer_methods,
    .tp_members = packer_members,
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
};

/* ---- the module ---- */

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "offload._fast",
    .m_doc = "The short way of a save by reference.",
    .m_size = -1,
};

static int intern_names(void)
{
    struct {
        PyObject **name;
        const char *text;
    } names[] = {
        {&name_base, "_base"},
        {&name_version, "_version"},
        {&name_data_ptr, "data_ptr"},
        {&name_detach, "detach"},
        {&name_dtype, "dtype"},
        {&name_is_contiguous, "is_contiguous"},
        {&name_is_late, "is_late"},
        {&name_is_nested, "is_nested"},
        {&name_is_quantized, "is_quantized"},
        {&name_is_reference, "is_reference"},
        {&name_nbytes, "nbytes"},
        {&name_num_to_skip, "num_to_skip"},
        {&name_open, "open"},
        {&name_shape, "shape"},
        {&name_untyped_storage, "untyped_storage"},
    };
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
        if ((*names[i].name = PyUnicode_InternFromString(names[i].text)) == NULL)
            return -1;
    return 0;
}

PyMODINIT_FUNC PyInit__fast(void)
{
    if (intern_names() < 0 || ready_books() < 0 || PyType_Ready(&ReaderType) < 0 ||
        PyType_Ready(&KeptType) < 0 || PyType_Ready(&PackerType) < 0)
        return NULL;
    PyObject *made = PyModule_Create(&module);
    if (made != NULL && (PyModule_AddObjectRef(made, "Packer", (PyObject *)&PackerType) < 0 ||
                         PyModule_AddObjectRef(made, "Books", (PyObject *)&BooksType) < 0 ||
                         PyModule_AddObjectRef(made, "Reader", (PyObject *)&ReaderType) < 0))
        Py_CLEAR(made);
    return made;
}
