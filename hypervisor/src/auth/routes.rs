//! Every route of this module on one page. What they do is in the other files.

use super::{Auth, account, admin, audit, device, hosts, login, recovery, register, tokens, views};
use crate::pages;

super::routes! {
    pub ROUTES, router -> Auth;

    Public GET get "/login" => views::login;
    Public GET get "/register" => views::register;
    Public GET get "/recover" => views::recover;
    Session GET get "/account" => views::account;
    Session GET get "/auth/device" => views::device;
    Public GET get "/assets/{file}" => pages::asset;

    Public POST post "/auth/register/start" => register::start;
    Public POST post "/auth/register/finish" => register::finish;
    Public POST post "/auth/login/start" => login::start;
    Public POST post "/auth/login/finish" => login::finish;
    Public POST post "/auth/recovery" => recovery::recover;
    Public POST post "/auth/logout" => login::logout;
    Public GET get "/auth/me" => login::me;
    Session POST post "/auth/step-up/start" => login::step_up_start;
    Session POST post "/auth/step-up/finish" => login::step_up_finish;
    Public POST post "/auth/device/start" => device::start;
    Public POST post "/auth/device/poll" => device::poll;
    Session POST post "/auth/device/approve" => device::approve;
    Session POST post "/auth/device/deny" => device::deny;
    Session GET get "/auth/open" => hosts::open;

    User GET get "/me/passkeys" => account::passkeys;
    Session DELETE delete "/me/passkeys/{id}" => account::delete_passkey;
    User GET get "/me/sessions" => account::sessions;
    Session DELETE delete "/me/sessions" => account::delete_sessions;
    Session DELETE delete "/me/sessions/{id}" => account::delete_session;
    User GET get "/me/tokens" => tokens::list;
    Session POST post "/me/tokens" => tokens::create;
    User DELETE delete "/me/tokens/{id}" => tokens::delete;
    User GET get "/me/recovery-codes" => account::recovery_codes;
    Session POST post "/me/recovery-codes" => account::new_recovery_codes;
    User GET get "/me/audit" => audit::own;

    Admin GET get "/admin/users" => admin::users;
    Admin GET get "/admin/invites" => admin::invites;
    Admin POST post "/admin/invites" => admin::invite;
    Admin DELETE delete "/admin/invites/{id}" => admin::delete_invite;
    Admin GET get "/admin/audit" => audit::everybodys;
}
