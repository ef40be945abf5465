// A PKCS #11 module for tests that stands between a program and a real module,
// records every call, and kills the program before or after one of them, or fills a
// file system then. It changes nothing else and never looks at an argument.
//
//   P11CRASH_MODULE  the real module
//   P11CRASH_LOG     file that gets the lines "<number> <function> before|after"
//   P11CRASH_AT      number of the call to kill at, from 1; unset or 0: none
//   P11CRASH_WHEN    before or after that call
//   P11CRASH_FILL    nothing is killed: this file is made, as large as its file system allows
//
// Calls are counted over all threads of the process. The trampolines are generic:
// no function of PKCS #11 v2.40 has more than eight arguments, all are integers or
// pointers, and in the C calling conventions of Linux the caller alone knows how
// many there are; passing eight on is harmless.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CK_PTR *
#define CK_DECLARE_FUNCTION(type, name) type name
#define CK_DECLARE_FUNCTION_POINTER(type, name) type(*name)
#define CK_CALLBACK_FUNCTION(type, name) type(*name)
#define NULL_PTR NULL
#include "pkcs11.h"

typedef CK_RV (*function)(uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t);

static pthread_once_t once = PTHREAD_ONCE_INIT;
static CK_FUNCTION_LIST *real; // NULL: the set-up failed and said why
static CK_FUNCTION_LIST ours;
static atomic_int calls;
static int log_fd, at, kill_after;
static const char *fill;

static void point(int number, const char *name, int after)
{
	char line[96];
	int n = snprintf(line, sizeof line, "%d %s %s\n", number, name, after ? "after" : "before");
	if (write(log_fd, line, n) != n) { // O_APPEND: one write is one line
		perror("p11crash: P11CRASH_LOG");
		abort();
	}
	if (number == at && after == kill_after && fill) {
		static char page[4096];
		int fd = open(fill, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
		while (write(fd, page, sizeof page) > 0)
			;
		close(fd);
	} else if (number == at && after == kill_after) {
		kill(getpid(), SIGKILL);
		for (;;)
			pause();
	}
}

#define CK_PKCS11_FUNCTION_INFO(name) \
	static CK_RV p11crash_##name(uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t d, \
				     uintptr_t e, uintptr_t f, uintptr_t g, uintptr_t h) \
	{ \
		int number = atomic_fetch_add(&calls, 1) + 1; \
		point(number, #name, 0); \
		CK_RV rv = real->name ? ((function)(void *)real->name)(a, b, c, d, e, f, g, h) \
				      : CKR_FUNCTION_NOT_SUPPORTED; \
		point(number, #name, 1); \
		return rv; \
	}
#include "pkcs11f.h"
#undef CK_PKCS11_FUNCTION_INFO

static void set_up(void)
{
	const char *module = getenv("P11CRASH_MODULE"), *log = getenv("P11CRASH_LOG");
	const char *number = getenv("P11CRASH_AT"), *when = getenv("P11CRASH_WHEN");
	CK_FUNCTION_LIST *list = NULL;

	if (!module || !log) {
		fprintf(stderr, "p11crash: P11CRASH_MODULE and P11CRASH_LOG are needed\n");
		return;
	}
	fill = getenv("P11CRASH_FILL");
	at = number ? atoi(number) : 0;
	kill_after = when && !strcmp(when, "after");
	if (at && !kill_after && (!when || strcmp(when, "before"))) {
		fprintf(stderr, "p11crash: P11CRASH_WHEN is neither before nor after\n");
		return;
	}
	log_fd = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
	if (log_fd < 0) {
		perror("p11crash: P11CRASH_LOG");
		return;
	}
	void *library = dlopen(module, RTLD_NOW | RTLD_LOCAL);
	CK_C_GetFunctionList get = library ? (CK_C_GetFunctionList)dlsym(library, "C_GetFunctionList") : NULL;
	if (!get || get(&list) != CKR_OK) {
		fprintf(stderr, "p11crash: %s is not a PKCS #11 module\n", module);
		return;
	}
	ours.version = list->version;
#define CK_PKCS11_FUNCTION_INFO(name) ours.name = (CK_##name)(void *)p11crash_##name;
#include "pkcs11f.h"
#undef CK_PKCS11_FUNCTION_INFO
	ours.C_GetFunctionList = C_GetFunctionList; // the trampoline would hand out the real list
	real = list;
}

// The only function that a program looks up by name is a call like the others.
CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR list)
{
	pthread_once(&once, set_up);
	if (!real)
		return CKR_GENERAL_ERROR;
	int number = atomic_fetch_add(&calls, 1) + 1;
	point(number, "C_GetFunctionList", 0);
	if (list)
		*list = &ours;
	point(number, "C_GetFunctionList", 1);
	return list ? CKR_OK : CKR_ARGUMENTS_BAD;
}
