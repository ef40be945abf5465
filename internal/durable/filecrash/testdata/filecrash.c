// A supervisor for tests that runs a program, records its operations on the files
// of a directory, and kills it before or after one of them. It changes nothing
// else: it only stops the program's threads at their system calls (ptrace(2)).
//
//   filecrash LOG NUMBER before|after|none DIRECTORY PROGRAM [ARGUMENT...]
//
// LOG gets the lines "<number> <operation>:<file> before|after". Operations are
// counted from 1 over all threads of the program, in the order in which they
// begin; programs that it starts are not watched. Counted is what opens, locks or
// changes a file or a name: reading, asking and closing change nothing. The random
// part of a file's name is written as "#".
//
// Before is before the kernel sees the call, after is when it has done it and
// the program does not know yet. A program that was killed so ends the supervisor in the
// same way; otherwise its exit code is the supervisor's, and 125 is the supervisor's own.
#define _GNU_SOURCE
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

// What a call names its file by: an argument that is a descriptor, a path, or a
// directory's descriptor before a path. A rename or a link is of its second file.
enum names { FD, PATH, PATH2, AT, AT1, AT2 };

static const struct operation {
	long number;
	const char *name;
	enum names names;
} operations[] = {
#ifdef SYS_open // architectures that still have these
	{ SYS_open, "open", PATH }, { SYS_creat, "creat", PATH }, { SYS_mkdir, "mkdir", PATH },
	{ SYS_unlink, "unlink", PATH }, { SYS_rmdir, "rmdir", PATH }, { SYS_chmod, "chmod", PATH },
	{ SYS_rename, "rename", PATH2 }, { SYS_link, "link", PATH2 }, { SYS_symlink, "symlink", PATH2 },
#endif
#ifdef SYS_renameat
	{ SYS_renameat, "rename", AT2 },
#endif
	{ SYS_openat, "open", AT }, { SYS_mkdirat, "mkdir", AT }, { SYS_unlinkat, "unlink", AT },
	{ SYS_fchmodat, "chmod", AT }, { SYS_renameat2, "rename", AT2 }, { SYS_linkat, "link", AT2 },
	{ SYS_symlinkat, "symlink", AT1 }, { SYS_truncate, "truncate", PATH }, { SYS_utimensat, "utimens", AT },
	{ SYS_write, "write", FD }, { SYS_pwrite64, "pwrite", FD }, { SYS_writev, "writev", FD },
	{ SYS_fsync, "fsync", FD }, { SYS_fdatasync, "fdatasync", FD }, { SYS_ftruncate, "ftruncate", FD },
	{ SYS_fallocate, "fallocate", FD }, { SYS_fchmod, "fchmod", FD }, { SYS_fchown, "fchown", FD },
	{ SYS_flock, "flock", FD },
};

// A thread, with the operation that it is in: none has the number 0.
static struct thread {
	pid_t id;
	int number;
	char what[NAME_MAX + 32];
} threads[4096];

static const char *directory;
static int log_fd, at, kill_after, count;
static pid_t program;

static void die(const char *format, ...)
{
	va_list args;
	va_start(args, format);
	fprintf(stderr, "filecrash: ");
	vfprintf(stderr, format, args);
	fprintf(stderr, "\n");
	va_end(args);
	exit(125);
}

static struct thread *thread_of(pid_t id)
{
	struct thread *empty = NULL;
	for (size_t i = 0; i < sizeof threads / sizeof *threads; i++) {
		if (threads[i].id == id)
			return &threads[i];
		if (!threads[i].id && !empty)
			empty = &threads[i];
	}
	if (!empty)
		die("too many threads");
	return empty;
}

// link_of reads a link of the thread's: an open file, or its working directory.
static int link_of(pid_t id, const char *kind, char *path)
{
	char link[64];
	snprintf(link, sizeof link, "/proc/%d/%s", id, kind);
	ssize_t n = readlink(link, path, PATH_MAX - 1);
	path[n < 0 ? 0 : n] = 0;
	return n >= 0;
}

static int path_of(pid_t id, int fd, unsigned long address, char *path)
{
	char name[PATH_MAX] = "", kind[32];
	struct iovec to = { name, sizeof name - 1 }, from = { (void *)address, sizeof name - 1 };
	if (process_vm_readv(id, &to, 1, &from, 1, 0) < 0)
		return 0;
	if (name[0] == '/') {
		strcpy(path, name);
		return 1;
	}
	snprintf(kind, sizeof kind, "fd/%d", fd);
	if (!link_of(id, fd == AT_FDCWD ? "cwd" : kind, path) || strlen(path) + strlen(name) + 2 > PATH_MAX)
		return 0;
	strcat(strcat(path, "/"), name);
	return 1;
}

// random_part is the length of what is another in each run: a UUID, a digest, or a
// number of renameio's.
static size_t random_part(const char *name, const char *at)
{
	size_t hex = strspn(at, "0123456789abcdef"), uuid = strspn(at, "0123456789abcdef-"), number = strspn(at, "0123456789");
	int begins = at == name || !isalnum((unsigned char)at[-1]);
	return begins && uuid == 36 ? uuid : begins && hex >= 16 ? hex : number >= 6 ? number : 0;
}

// describe says what the call does to a file of the directory, or returns 0.
static int describe(pid_t id, unsigned long number, const __uint64_t *args, char *what, size_t size)
{
	char path[PATH_MAX] = "", kind[32];
	const struct operation *op = operations, *end = operations + sizeof operations / sizeof *operations;
	while (op < end && op->number != (long)number)
		op++;
	if (op == end)
		return 0;
	int found = 0;
	switch (op->names) {
	case FD:
		snprintf(kind, sizeof kind, "fd/%d", (int)args[0]);
		found = link_of(id, kind, path);
		break;
	case PATH: found = path_of(id, AT_FDCWD, args[0], path); break;
	case PATH2: found = path_of(id, AT_FDCWD, args[1], path); break;
	case AT: found = path_of(id, (int)args[0], args[1], path); break;
	case AT1: found = path_of(id, (int)args[1], args[2], path); break;
	case AT2: found = path_of(id, (int)args[2], args[3], path); break;
	}
	size_t length = strlen(directory);
	if (!found || strncmp(path, directory, length) || (path[length] && path[length] != '/'))
		return 0;
	const char *file = path[length] ? strrchr(path, '/') + 1 : ".";
	int n = snprintf(what, size, "%s:", op->name);
	for (const char *c = file; *c && (size_t)n + 2 < size;) {
		size_t random = random_part(file, c);
		if (random) {
			what[n++] = '#';
			c += random;
		} else {
			what[n++] = isgraph((unsigned char)*c) ? *c : '?';
			c++;
		}
	}
	what[n] = 0;
	return 1;
}

// point records one, and kills the program if it is the one. Then nothing is resumed.
static int point(const struct thread *t, int after)
{
	char line[NAME_MAX + 64];
	int n = snprintf(line, sizeof line, "%d %s %s\n", t->number, t->what, after ? "after" : "before");
	if (write(log_fd, line, n) != n)
		die("log: %s", strerror(errno));
	if (t->number != at || after != kill_after)
		return 0;
	if (kill(program, SIGKILL))
		die("kill: %s", strerror(errno));
	return 1;
}

static int system_call(struct thread *t)
{
	struct __ptrace_syscall_info info;
	if (ptrace(PTRACE_GET_SYSCALL_INFO, t->id, sizeof info, &info) < 0)
		return 0; // it is being killed
	if (info.op == PTRACE_SYSCALL_INFO_ENTRY && describe(t->id, info.entry.nr, info.entry.args, t->what, sizeof t->what)) {
		t->number = ++count;
		return point(t, 0);
	}
	if (info.op == PTRACE_SYSCALL_INFO_EXIT && t->number) {
		int killed = point(t, 1);
		t->number = 0;
		return killed;
	}
	return 0;
}

static void start(char **command)
{
	program = fork();
	if (program < 0)
		die("fork: %s", strerror(errno));
	if (program == 0) {
		if (ptrace(PTRACE_TRACEME, 0, 0, 0))
			die("ptrace is not permitted on this machine: %s (a container needs the capability SYS_PTRACE)", strerror(errno));
		raise(SIGSTOP);
		execvp(command[0], command);
		die("%s: %s", command[0], strerror(errno));
	}
	int status;
	if (waitpid(program, &status, 0) != program || !WIFSTOPPED(status))
		exit(125); // the child has said why
	if (ptrace(PTRACE_SETOPTIONS, program, 0, PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACECLONE | PTRACE_O_TRACEEXEC | PTRACE_O_EXITKILL) ||
	    ptrace(PTRACE_SYSCALL, program, 0, 0))
		die("ptrace: %s", strerror(errno));
	thread_of(program)->id = program;
}

// supervise returns the status that the program ended with.
static int supervise(void)
{
	int status, ended = 0, killed = 0;
	for (;;) {
		pid_t id = waitpid(-1, &status, __WALL);
		if (id < 0 && errno == EINTR)
			continue;
		if (id < 0)
			return ended;
		struct thread *t = thread_of(id);
		if (!WIFSTOPPED(status)) {
			t->id = t->number = 0;
			if (id == program)
				ended = status;
			continue;
		}
		int sig = WSTOPSIG(status), is_new = t->id != id;
		t->id = id;
		if (is_new) // a thread begins with a SIGSTOP of ptrace's
			sig = 0, t->number = 0;
		else if (sig == (SIGTRAP | 0x80))
			sig = 0, killed |= !killed && system_call(t);
		else if (status >> 16)
			sig = 0; // a clone or an exec
		if (!killed)
			ptrace(PTRACE_SYSCALL, id, 0, sig); // fails for one that is being killed
	}
}

int main(int argc, char **argv)
{
	if (argc < 6)
		die("usage: filecrash LOG NUMBER before|after|none DIRECTORY PROGRAM [ARGUMENT...]");
	at = atoi(argv[2]);
	kill_after = !strcmp(argv[3], "after");
	if (strcmp(argv[3], at ? "before" : "none") && !(at && kill_after))
		die("%s is not a side of operation %d", argv[3], at);
	directory = argv[4];
	if (directory[0] != '/')
		die("%s is not an absolute path", directory);
	log_fd = open(argv[1], O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
	if (log_fd < 0)
		die("%s: %s", argv[1], strerror(errno));
	start(argv + 5);
	int status = supervise();
	if (WIFSIGNALED(status)) {
		signal(WTERMSIG(status), SIG_DFL);
		raise(WTERMSIG(status));
	}
	return WEXITSTATUS(status);
}
